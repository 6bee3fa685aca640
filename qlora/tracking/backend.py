"""A tracker that a recipe can ask for: its section, its folder in a run, and its sink, which may fail."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.tracking.sink import Metrics, Sample, Sink


@dataclass(frozen=True)
class Run:
    """The run that is tracked."""

    path: Path
    config: Mapping[str, Any]
    """the resolved recipe"""
    resume_step: int
    """the step that a resumed run goes on from, 0 for a new one"""
    note: Callable[[str], object]
    """shows a line to the user"""


@dataclass(frozen=True)
class Backend:
    """Name, files and sink of a tracker."""

    name: str
    """of its section in `tracking` and of its folder in a run, which --fresh removes"""
    files: re.Pattern[str]
    """names of what it writes into its folder"""
    open: Callable[[Any, Run], Sink | None]
    """(section, run) -> its sink; None where the section turns it off. May raise, see Guarded."""


class Guarded(Sink):
    """Passes everything to a backend's sink, until that raises: it is off then, with one note, and the run goes on."""

    def __init__(self, backend: Backend, section: Any, run: Run) -> None:
        self._name, self._note = backend.name, run.note
        self._sink = Sink()
        with self._guard():
            self._sink = backend.open(section, run) or Sink()

    def step(self, record: Metrics) -> None:
        """As Sink."""
        with self._guard():
            self._sink.step(record)

    def evaluation(self, record: Metrics) -> None:
        """As Sink."""
        with self._guard():
            self._sink.evaluation(record)

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """As Sink."""
        with self._guard():
            self._sink.samples(samples, step)

    def memory(self, content: Metrics, picture: Path) -> None:
        """As Sink."""
        with self._guard():
            self._sink.memory(content, picture)

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """As Sink."""
        with self._guard():
            self._sink.finish(summary, failed=failed)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the training
            self._sink = Sink()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._note(f"tracking.{self._name} is off for this run: {reason}")
