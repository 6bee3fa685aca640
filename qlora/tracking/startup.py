"""Stages of a command before its first result, shown as they happen, with their durations."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, cast

from qlora.runtime.progress import Progress
from qlora.runtime.streams import Unbreakable
from qlora.tracking.sink import Sink

DETAIL_SECONDS = 15.0
"""shortest time between two lines about the progress of one stage, in a log file"""


class Startup:
    """Shows the stages of a start on standard error.

    A terminal gets a status line that is removed at the end of a stage; a file or a pipe gets one line for each stage,
    without bars or padding.

    Args:
        shown: show stages and lines; otherwise only measure the durations.
        verbose: also print the duration of each stage at its end.

    Examples:
        >>> startup = Startup()
        >>> with startup.stage("reading the data") as progress:
        ...     progress("tokenizing: 1,024 of 52,002 rows")
        >>> startup.seconds
        {'reading the data': 0.01}
    """

    def __init__(self, *, shown: bool = True, verbose: bool = False) -> None:
        self.shown, self.verbose = shown, verbose
        self.seconds: dict[str, float] = {}
        """durations of the stages so far, in seconds"""
        self._stream = cast(IO[str], Unbreakable(sys.stderr))
        self._terminal = shown and sys.stderr.isatty()

    @contextmanager
    def stage(self, name: str, *, own_bars: bool = False) -> Iterator[Progress]:
        """Show that stage `name` is in progress; yield a function that shows a detail of it.

        `own_bars`: a library draws progress bars in this stage, so on a terminal a plain line replaces the status line.
        """
        began = time.perf_counter()
        spins = self._terminal and not own_bars
        if self.shown and not spins:
            self._print(name)
        try:
            with self._spinner(name) if spins else nullcontext(self._sparse()) as progress:
                yield progress
        finally:
            seconds = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if self.shown and self.verbose:
            self._print(f"{name}: {seconds:.1f} s")

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print rows of a label and a text as two columns. On a terminal, long texts are wrapped in their column."""
        if not self.shown:
            return
        if self._terminal:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            grid = Table.grid(padding=(0, 2))
            for label, text in rows:
                grid.add_row(Text(label, "bold", no_wrap=True), Text(text))
            Console(file=self._stream, highlight=False).print(grid)
            return
        width = max((len(label) for label, _ in rows), default=0)
        for label, text in rows:
            self._print(f"{label:{width}}  {text}")

    def warn(self, text: str) -> None:
        """Print a warning; a start that shows nothing writes it to the log, as all warnings of a run."""
        if self.shown:
            self._print(f"note  {text}")
        else:
            logging.getLogger("qlora").warning(text)

    def display(self, run: Path, total_steps: int, first_step: int, loss_before: float | None) -> Sink:
        """Open the display of the steps that follow the start.

        Args:
            run: the run's folder.
            total_steps: optimizer steps of the whole run.
            first_step: step that the run resumes from; 0 for a new run.
            loss_before: held-out loss before step 1, if the run has computed it already.
        """
        from qlora.tracking.terminal import open_terminal

        return open_terminal(total_steps, first_step, loss_before)

    def _print(self, text: str) -> None:
        self._stream.write(text.rstrip() + "\n")
        self._stream.flush()

    @contextmanager
    def _spinner(self, name: str) -> Iterator[Progress]:
        from rich.console import Console
        from rich.markup import escape

        with Console(file=self._stream).status(escape(name)) as line:
            yield lambda text: line.update(escape(text))

    def _sparse(self) -> Progress:
        """Return a function that prints a line at most every DETAIL_SECONDS."""
        last = time.monotonic()

        def progress(text: str) -> None:
            nonlocal last
            if self.shown and not self._terminal and time.monotonic() - last >= DETAIL_SECONDS:
                last = time.monotonic()
                self._print(text)

        return progress


def silent() -> Startup:
    """Return a start that shows nothing."""
    return Startup(shown=False)
