"""Progress of a run on standard error: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, cast

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from qlora.runtime.streams import Unbreakable
from qlora.tracking.sink import Metrics, Sample, Sink, metrics_in

LINE_SECONDS = 5.0
"""shortest time between two progress lines in a log file"""

MAX_TEXT = 240
"""maximum length of a shown prompt or answer, in characters"""


def open_terminal(total_steps: int, first_step: int = 0, loss_before: float | None = None) -> Sink:
    """Open the progress display on standard error: a bar on a terminal, else lines.

    Args:
        total_steps: optimizer steps of the whole run.
        first_step: step that the run resumes from; 0 for a new run.
        loss_before: held-out loss before step 1, if the run has computed it already.
    """
    console = Console(file=cast(IO[str], Unbreakable(sys.stderr)), highlight=False)
    kind = Bar if console.is_terminal else Lines
    return kind(console, Pace(total_steps, first_step), loss_before)


class Pace:
    """Estimate of the time left, from the pace so far including evaluations and saves."""

    def __init__(
        self, total_steps: int, first_step: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps, self.first_step, self.clock = total_steps, first_step, clock
        self._first: tuple[int, float] | None = None

    def time_left(self, step: int) -> str:
        """Return a text such as `4:05 left`; empty at the first step, before there is a pace."""
        now = self.clock()
        if self._first is None:
            self._first = step, now
            return ""
        first_step, began = self._first
        return f"{_duration((now - began) / (step - first_step) * (self.total_steps - step))} left"


class _Printing(Sink):
    """Printing of evaluations, samples and notes, shared by `Bar` and `Lines`."""

    def __init__(self, console: Console, pace: Pace, loss_before: float | None = None) -> None:
        self.console, self.pace, self.loss_before = console, pace, loss_before

    def evaluation(self, record: Metrics) -> None:
        """Print the held-out loss, the first one for comparison, and the metrics."""
        step, loss = record["step"], record["eval_loss"]
        text = Text.assemble((f"step {step}", "bold"), f"  held-out loss {loss:.4f}")
        if step == 0:
            self.loss_before = loss
        elif self.loss_before is not None:
            text.append(f"  ({self.loss_before:.4f} at step 0)", "dim")
        for name, value in metrics_in(record).items():
            text.append(f"  {name} {value:.4g}")
        self._print(text)

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Print the conversation, prompt, expected answer and answer as rows, with a tick if both answers are equal."""
        for sample in samples:
            same = sample.answer.strip() == sample.reference.strip()
            rows = [(Text("before", "dim"), one_line(sample.before))] if sample.before else []
            rows.append((Text("prompt", "dim"), one_line(sample.prompt)))
            if sample.reference:
                rows.append((Text("expected", "dim"), one_line(sample.reference)))
            mark = Text("answer ✓" if same else "answer", "green" if same else "dim")
            rows.append((mark, one_line(sample.answer)))
            self._rows(rows)

    def _rows(self, rows: list[tuple[Text, Text]]) -> None:
        """Print a block of two columns; in a log each row is a line, without padding at its end."""
        if self.console.is_terminal:
            grid = Table.grid(padding=(0, 2))
            for row in rows:
                grid.add_row(*row)
            self._print(Padding(grid, (0, 0, 1, 2), expand=False))
            return
        width = max(len(label) for label, _ in rows)
        for label, text in rows:
            self._print(Text(f"  {label.plain:{width}}  {text.plain}".rstrip()))
        self._print(Text())

    def note(self, text: str) -> None:
        """Print a line that starts with the word `note`."""
        self._print(Text.assemble(("note", "yellow"), f"  {text}"))

    def _print(self, what: RenderableType) -> None:
        """Print; in a log, a line of text is never wrapped."""
        self.console.print(what, soft_wrap=isinstance(what, Text) and not self.console.is_terminal)


class Lines(_Printing):
    """Progress for a file or a pipe: a line at most every LINE_SECONDS, and one at the last step."""

    _printed = float("-inf")

    def step(self, record: Metrics) -> None:
        """Print a line if LINE_SECONDS have passed or this is the last step."""
        step, now, left = record["step"], self.pace.clock(), self.pace.time_left(record["step"])
        if now - self._printed < LINE_SECONDS and step < self.pace.total_steps:
            return
        self._printed = now
        line = "  ".join(filter(None, [f"step {step}/{self.pace.total_steps}", step_numbers(record), left]))
        self._print(Text(line))


class Bar(_Printing):
    """Progress for a terminal: a bar on the last line, everything else above it."""

    def __init__(self, console: Console, pace: Pace, loss_before: float | None = None) -> None:
        super().__init__(console, pace, loss_before)
        fixed = Column(no_wrap=True)
        self.progress = Progress(
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("[bold]{task.completed}[/]/{task.total}", table_column=fixed),
            TextColumn("{task.fields[numbers]}", table_column=fixed),
            TextColumn("{task.fields[left]}", style="cyan", table_column=fixed),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task(
            "", total=pace.total_steps, completed=pace.first_step, numbers="starting", left=""
        )
        self.progress.start()

    def step(self, record: Metrics) -> None:
        """Advance the bar, which is redrawn at most ten times a second."""
        left = self.pace.time_left(record["step"])
        self.progress.update(self.task, completed=record["step"], numbers=step_numbers(record), left=left)

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Stop the bar and leave its last state on the screen."""
        self.progress.update(self.task, left="")
        self.progress.stop()


def one_line(text: str) -> Text:
    """Make text from data or a model safe to print: one line, no markup or control codes, at most MAX_TEXT long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    half = MAX_TEXT // 2
    return Text(line if len(line) <= MAX_TEXT else f"{line[:half]} … {line[-half:]}")


def step_numbers(record: Metrics) -> str:
    """Return the loss, the auxiliary loss if there is one, the learning rate and the speed of a step as text."""
    aux = f"  aux_loss {record['aux_loss']:.4f}" if "aux_loss" in record else ""
    return f"loss {record['loss']:.4f}{aux}  lr {record['lr']:.1e}  {record['tokens_per_second']:,.0f} tok/s"


def _duration(seconds: float) -> str:
    """Format as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
