"""One line on the terminal while something takes time."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def status(first: str, *, wanted: bool = True) -> Iterator[Callable[[str], object]]:
    """Show on standard error what is being done, if that is a terminal; yield what changes the line."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(first) as line:
        yield line.update
