"""Standard output and error whose reader may go away: a terminal that is closed, a pipe into `head`."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

GONE = (errno.EPIPE, errno.EIO)
"""errors of a write that nobody reads any more: to a pipe, to a terminal"""


class Unbreakable:
    """A text file that can be written to whether or not somebody reads it.

    `whole`: what is written must all arrive where there is a reader, so that a full disk stays an error.
    """

    def __init__(self, file: IO[str], *, whole: bool = False) -> None:
        self._file, self._whole = file, whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write if that is possible."""
        with self._forgiving():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with self._forgiving():
            self._file.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in GONE:
                _let_go(self._file)
            elif self._whole:
                raise


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """Keep a reader who goes away from ending this process or changing its exit code.

    A full disk behind standard output stays an error.
    """
    before = sys.stdout, sys.stderr
    output, errors = Unbreakable(sys.stdout, whole=True), Unbreakable(sys.stderr)
    sys.stdout, sys.stderr = cast(Any, output), cast(Any, errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        errors.flush()
        output.flush()


def _let_go(file: IO[str]) -> None:
    """Point a file's descriptor at /dev/null: what its buffer holds would fail again when the process ends."""
    with suppress(OSError):  # it has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
