"""Tracking of a run: the record metrics.jsonl, the terminal, and the trackers enabled in the recipe."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora.tracking import tensorboard, wandb
from qlora.tracking.backend import Backend, Guarded, Run
from qlora.tracking.record import Record
from qlora.tracking.sink import Metrics, Sample, Sink

__all__ = ["BACKENDS", "Sample", "Tracker"]

BACKENDS: dict[str, Backend] = {module.BACKEND.name: module.BACKEND for module in (wandb, tensorboard)}
"""trackers by the name of their section in a recipe's `tracking`"""


class Tracker:
    """Passes a run's metrics, samples and notes to every sink: first to the record, then to terminal and trackers.

    Args:
        run: the run's folder; the record is metrics.jsonl in it.
        config: the resolved recipe, for trackers that show it with the metrics.
        sections: the recipe's sections of `tracking` by name; a tracker without a section is off.
        total_steps: optimizer steps of the whole run.
        resume_step: step of the checkpoint that the run resumes from; 0 for a new run.
        evaluation_due: the evaluation of that step is repeated, and replaces an earlier one in the record.
        loss_before: held-out loss before the first step, of a run that resumes.
        terminal: show progress on standard error; otherwise only notes are shown, in the log `qlora`.
        display: opens the display of the steps; None: progress on standard error.
        main: False in all processes of a distributed run except the first; these record and show nothing.

    As a context manager it also closes the sinks when an exception ends the run.

    >>> with Tracker(run, config=recipe.to_dict(), sections=dict(recipe.tracking), total_steps=9) as tracker:
    ...     tracker.step({"step": 1, "loss": 2.5, "lr": 2e-4, "tokens_per_second": 900.0})  # doctest: +SKIP
    ...     tracker.finish({"loss_after": 1.9})
    """

    def __init__(
        self,
        run: Path,
        *,
        config: Mapping[str, Any],
        sections: Mapping[str, Any],
        total_steps: int,
        resume_step: int = 0,
        evaluation_due: bool = False,
        loss_before: float | None = None,
        terminal: bool = True,
        display: Callable[[], Sink] | None = None,
        main: bool = True,
    ) -> None:
        self._sinks: list[Sink] = []
        self._record: Record | None = None
        if not main:
            return
        self._record = Record(run / "metrics.jsonl", resume_step, evaluation_due)
        self._sinks.append(self._record)
        shown = display or (lambda: _terminal(total_steps, resume_step, loss_before))
        self._sinks.append(shown() if terminal else _Log())
        tracked = Run(run, config, resume_step, self.note)
        for name, section in sections.items():
            self._sinks.append(Guarded(BACKENDS[name], section, tracked))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close({}, failed=error is not None)

    def sync_record(self) -> str | None:
        """Flush the record to disk before a checkpoint refers to it, and return its SHA-256, if there is a record."""
        return None if self._record is None else self._record.sync()

    def check_record(self, sha256: str | None, step: int) -> None:
        """Show a note if the record of the first `step` steps is not the one that `sync_record` described."""
        if self._record is not None and (damage := self._record.damage(sha256, step)) is not None:
            self.note(damage)

    def step(self, record: Metrics) -> None:
        """Record an optimizer step: step, loss, lr, grad_norm, tokens_per_second, tokens, supervised_tokens.

        `aux_loss` is the auxiliary loss, without its coefficient; only in runs that have one.
        """
        for sink in self._sinks:
            sink.step(record)

    def evaluation(self, record: Metrics) -> None:
        """Record an evaluation: step, eval_loss (nats per supervised token), eval_tokens, eval_ with each metric."""
        for sink in self._sinks:
            sink.evaluation(record)

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Record the model's answers to held-out prompts after `step` steps."""
        for sink in self._sinks:
            sink.samples(samples, step)

    def memory(self, content: Metrics, picture: Path) -> None:
        """Record the run's memory: the content of memory.json, and the file memory.png."""
        for sink in self._sinks:
            sink.memory(content, picture)

    def note(self, text: str) -> None:
        """Show a line to the user."""
        for sink in self._sinks:
            sink.note(text)

    def finish(self, summary: Metrics) -> None:
        """Record the run's summary and close all sinks. Raises SaveError if the record is incomplete."""
        self._close(summary, failed=False)

    def _close(self, summary: Metrics, *, failed: bool) -> None:
        """Close every sink once, the record last; sinks that are still open receive the notes of those being closed."""
        while self._sinks:
            self._sinks.pop().finish(summary, failed=failed)


class _Log(Sink):
    """Writes notes to the log, and nothing else."""

    def note(self, text: str) -> None:
        logging.getLogger("qlora").warning(text)


def _terminal(total_steps: int, first_step: int, loss_before: float | None) -> Sink:
    from qlora.tracking.terminal import open_terminal

    return open_terminal(total_steps, first_step, loss_before)
