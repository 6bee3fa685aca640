"""Standard output and error that tolerate a closed reader, such as a closed terminal or a pipe into `head`."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

GONE = (errno.EPIPE, errno.EIO)
"""errors of a write to a closed pipe or terminal"""


class Unbreakable:
    """A text stream that ignores the errors of a closed reader.

    Args:
        file: the stream to wrap.
        whole: raise other write errors, such as a full disk; otherwise ignore them too.
    """

    def __init__(self, file: IO[str], *, whole: bool = False) -> None:
        self._file, self._whole = file, whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write `text`; discard it if the reader is gone."""
        with self._forgiving():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; do nothing if the reader is gone."""
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
    """Make standard output and error ignore a closed reader, so that the process continues with its exit code.

    Other errors of standard output, such as a full disk, are still raised.
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
    """Point the file descriptor at /dev/null, because a flush of the buffer at exit would fail again."""
    with suppress(OSError):  # the stream has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
