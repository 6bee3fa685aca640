"""Tracker that a recipe can enable: its section, its folder in a run, and its sink, whose errors never end a run."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import first_line
from qlora.tracking.sink import Metrics, Sample, Sink


@dataclass(frozen=True)
class Run:
    """The tracked run."""

    path: Path
    config: Mapping[str, Any]
    """the resolved recipe"""
    resume_step: int
    """step of the checkpoint that the run resumes from; 0 for a new run"""
    note: Callable[[str], object]
    """shows a line to the user"""


@dataclass(frozen=True)
class Backend:
    """Name, files and sink of a tracker."""

    name: str
    """name of its section in `tracking` and of its folder in a run, which --fresh removes"""
    files: re.Pattern[str]
    """pattern of the names that it writes into its folder"""
    open: Callable[[Any, Run], Sink | None]
    """(section, run) -> its sink, or None if the section turns it off; exceptions are handled by `Guarded`"""


class Guarded(Sink):
    """Passes everything to a backend's sink. The first exception turns the sink off, with a note; the run continues."""

    def __init__(self, backend: Backend, section: Any, run: Run) -> None:
        self._name, self._note = backend.name, run.note
        self._sink = Sink()
        with self._guard():
            self._sink = backend.open(section, run) or Sink()

    def step(self, record: Metrics) -> None:
        """See `Sink`."""
        with self._guard():
            self._sink.step(record)

    def evaluation(self, record: Metrics) -> None:
        """See `Sink`."""
        with self._guard():
            self._sink.evaluation(record)

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """See `Sink`."""
        with self._guard():
            self._sink.samples(samples, step)

    def memory(self, content: Metrics, picture: Path) -> None:
        """See `Sink`."""
        with self._guard():
            self._sink.memory(content, picture)

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """See `Sink`."""
        with self._guard():
            self._sink.finish(summary, failed=failed)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - an error of a tracker must not end the training
            self._sink = Sink()
            reason = first_line(error)
            self._note(f"tracking.{self._name} is off for this run: {reason}")
