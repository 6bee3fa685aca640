"""Status line on the terminal during a long operation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def status(first: str, *, wanted: bool = True) -> Iterator[Callable[[str], object]]:
    """Show a status line if standard error is a terminal; yield a function that replaces its text."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(first) as line:
        yield line.update
