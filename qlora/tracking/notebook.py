"""Progress of a run in a Jupyter notebook: one output of the cell, updated in place.

Lines on standard error would flood the cell. Here the stages of the start, the header, the steps, a picture of the
losses, the metrics, the sample answers and the notes share one output. It is drawn at most once in UPDATE_SECONDS, and
less often if drawing takes long. An output that cannot be updated never ends a run.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

from qlora.errors import first_line
from qlora.runtime.progress import Progress
from qlora.tracking.sink import Metrics, Sample, Sink, metrics_in
from qlora.tracking.startup import Startup
from qlora.tracking.terminal import Pace, one_line, step_numbers

UPDATE_SECONDS = 1.0
"""shortest time between two updates of the output"""

SHARE = 0.05
"""largest share of the time that is spent on updates"""

STYLE = "font-family: system-ui, sans-serif; font-size: 13px; max-width: 46em"


class Picture(Protocol):
    """A picture of a run in progress."""

    def step(self, record: Metrics) -> None: ...
    def evaluation(self, record: Metrics) -> None: ...
    def svg(self) -> str: ...


OpenPicture = Callable[[Path], Picture]
"""makes the picture of the run with this metrics.jsonl"""


def in_notebook() -> bool:
    """Return True in a kernel of Jupyter, whose front end shows outputs and updates them."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Live:
    """One output of a notebook cell.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.status = ""
        """the stage of the start, or the numbers of the newest step"""
        self.done: tuple[int, int] | None = None
        """steps taken, and steps of the whole run"""
        self.header: list[tuple[str, str]] = []
        """facts known before the first step"""
        self.evaluations: list[tuple[str, str]] = []
        """labels and numbers of the newest evaluation"""
        self.samples: Sequence[Sample] = ()
        self.notes: list[str] = []
        self.draw: Callable[[], str] = str
        """returns a picture as SVG"""
        self._clock, self._due = clock, float("-inf")
        self._handle: Any = None
        self._on = True

    def update(self, *, now: bool = False) -> None:
        """Show the present state, if the last update is long enough ago or it must be shown `now`."""
        began = self._clock()
        if not self._on or (began < self._due and not now):
            return
        try:
            self._show()
        except Exception as error:  # noqa: BLE001 - an output must not end the training
            self._on = False
            logging.getLogger("qlora").warning(
                f"the output of this cell is not updated any more: {first_line(error)}"
            )
        ended = self._clock()
        self._due = ended + max(UPDATE_SECONDS, (ended - began) / SHARE)

    def _show(self) -> None:
        from IPython.display import display

        content = {"text/html": self.html(), "text/plain": self.text()}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def text(self) -> str:
        """Return the state in one line, for a front end without HTML."""
        steps = [] if self.done is None else [f"step {self.done[0]} of {self.done[1]}"]
        return "  ".join([*steps, self.status, *(f"{label} {number}" for label, number in self.evaluations)])

    def html(self) -> str:
        """Return the state as HTML, without scripts; all text in it is escaped."""
        parts = []
        if self.done is not None:
            taken, total = self.done
            parts.append(f'<progress value="{taken}" max="{total}"></progress> step {taken:,} of {total:,}')
        parts += [f"<span>{escape(self.status)}</span>", f'<div style="max-width: 34em">{self.draw()}</div>']
        if self.evaluations:
            parts.append(_table(self.evaluations))
        parts += [f"<div><b>note</b> {escape(note)}</div>" for note in self.notes]
        if self.samples:
            parts.append(f"<details open><summary>sample answers</summary>{_samples(self.samples)}</details>")
        if self.header:
            parts.append(f"<details><summary>this run</summary>{_table(self.header)}</details>")
        return f'<div style="{STYLE}">{"".join(parts)}</div>'


class NotebookStartup(Startup):
    """Shows the stages of a start, and then the steps of the run, in one output.

    Args:
        picture: opens the picture of the run.
        live: the output; None: a new one.
    """

    def __init__(self, picture: OpenPicture, live: Live | None = None) -> None:
        super().__init__()
        self._picture, self._live = picture, live or Live()

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Show rows of a label and a text, which can be folded away."""
        self._live.header = rows
        self._live.update(now=True)

    def warn(self, text: str) -> None:
        """Show a warning, which stays."""
        self._live.notes.append(text)
        self._live.update(now=True)

    def display(self, run: Path, total_steps: int, first_step: int, loss_before: float | None) -> Sink:
        """Continue with the steps of the run in the same output."""
        return Notebook(
            self._live, self._picture(run / "metrics.jsonl"), Pace(total_steps, first_step), loss_before
        )

    def _print(self, text: str) -> None:
        self._live.status = text
        self._live.update(now=True)

    def _sparse(self) -> Progress:
        stage = self._live.status

        def progress(text: str) -> None:
            self._live.status = f"{stage}: {text}"
            self._live.update()

        return progress


class Notebook(Sink):
    """Shows steps, losses, metrics, samples and notes in the output `live`.

    Args:
        live: the output.
        picture: the picture of the losses.
        pace: estimate of the time left.
        loss_before: held-out loss before step 1, if the run has computed it already.
    """

    def __init__(self, live: Live, picture: Picture, pace: Pace, loss_before: float | None = None) -> None:
        self._live, self._picture, self._pace, self._loss_before = live, picture, pace, loss_before
        live.draw, live.done, live.status = picture.svg, (pace.first_step, pace.total_steps), "starting"
        live.update(now=True)

    def step(self, record: Metrics) -> None:
        """Show the step."""
        self._picture.step(record)
        self._live.done = record["step"], self._pace.total_steps
        self._live.status = "  ".join(
            filter(None, [step_numbers(record), self._pace.time_left(record["step"])])
        )
        self._live.update(now=record["step"] == self._pace.total_steps)

    def evaluation(self, record: Metrics) -> None:
        """Show the held-out loss, the first one for comparison, and the metrics."""
        self._picture.evaluation(record)
        step, loss = record["step"], f"{record['eval_loss']:.4f}"
        if step == 0:
            self._loss_before = record["eval_loss"]
        elif self._loss_before is not None:
            loss += f" ({self._loss_before:.4f} at step 0)"
        metrics = [(name, f"{value:.4g}") for name, value in metrics_in(record).items()]
        self._live.evaluations = [(f"held-out loss, step {step}", loss), *metrics]
        self._live.update()

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Show the newest answers."""
        self._live.samples = samples
        self._live.update()

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._live.notes.append(text)
        self._live.update(now=True)

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Show the last state and how the run ended."""
        self._live.status = _ending(summary, failed)
        self._live.update(now=True)


def _ending(summary: Metrics, failed: bool) -> str:
    if failed or not summary:
        return "ended by an error"
    if summary["result"] is not None:
        return f"finished: {summary['result']}"
    return f"stopped after step {summary['steps']:,}; continue with resume=True"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f'<tr><th style="text-align: left">{escape(label)}</th>'
        f'<td style="text-align: left">{escape(text)}</td></tr>'
        for label, text in rows
    )
    return f"<table>{cells}</table>"


def _samples(samples: Sequence[Sample]) -> str:
    """Return the answers as tables, with a tick if an answer is the expected one."""
    shown = []
    for sample in samples:
        same = sample.answer.strip() == sample.reference.strip()
        texts = [("before", sample.before), ("prompt", sample.prompt), ("expected", sample.reference)]
        rows = [(label, one_line(text).plain) for label, text in texts if text]
        shown.append(_table([*rows, ("answer ✓" if same else "answer", one_line(sample.answer).plain)]))
    return "".join(shown)
