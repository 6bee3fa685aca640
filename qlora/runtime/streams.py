"""Standard output and error of the program: a reader can go away, and no text of others can control the terminal.

Names of files and tensors, headers of tables, errors of templates and answers of models are not ours. All of them are
written here, so this is the one place that takes the control characters out.
"""

import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from qlora.errors import first_line

GONE = (errno.EPIPE, errno.EIO)
"""errors of a write to a closed pipe or terminal"""


COLOURS = r"\x1b\[(?:(?!0*8[;m])[0-9]+;?)*m"  # not 8, which hides text
CURSOR = r"\x1b\[(?:\?25[hl]|[0-9]*A|2K)|\r(?=\x1b\[|\n|$)"
"""what a progress bar writes: hide and show the cursor, go up, erase the line, go to its start"""
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
"""control characters of ASCII and Latin-1, and those that reverse the direction of text"""

_COLOURED = re.compile(f"({COLOURS})|{CONTROL}")
_LIVE = re.compile(f"({COLOURS}|{CURSOR})|{CONTROL}")
_BARS = re.compile(f"({COLOURS}|{CURSOR}|\\A\\r)|{CONTROL}")  # tqdm, as the hub's downloads show it


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that is closed, and let standard input pass on bytes that are no text.

    A file of the program would otherwise get the descriptor of a closed stream, and whatever is printed to it. Bytes
    that are not in the encoding become lone surrogates, which the prompts refuse with a message.
    """
    for descriptor, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest number that is free is this one; child processes inherit it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a caller in Python can have put another stream there
        sys.stdin.reconfigure(errors="surrogateescape")


def harmless(text: str, *, cursor: bool = False, bars: bool = False) -> str:
    """Replace control characters, except line breaks, tabs and colours.

    `cursor` also keeps the movements of a progress bar, and `bars` with it the return to the start of the line, with
    which a bar of other libraries begins.

    >>> harmless("a name\\x1b]0;title\\x07")
    'a name\ufffd]0;title\ufffd'
    """
    allowed = _COLOURED if not cursor else _BARS if bars else _LIVE
    return allowed.sub(lambda found: found[1] or "\ufffd", text)


class Unbreakable:
    """A text stream that outlives its reader and a full disk, and writes only harmless text.

    Args:
        file: the stream to wrap.
        whole: note errors other than those of a closed reader, such as a full disk: this is standard output. Otherwise
            ignore them too, and let other libraries draw their progress bars.
    """

    def __init__(self, file: IO[str], *, whole: bool = False) -> None:
        self._file, self._whole = file, whole
        self.failure: str | None = None
        """reason why a part of the text is lost, although its reader wants it"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write `text` without control characters; discard it if the reader is gone."""
        shown = harmless(text, cursor=self._file.isatty(), bars=not self._whole)
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        with self._forgiving():
            self._file.write(shown.encode(encoding, "backslashreplace").decode(encoding))
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
            if error.errno in GONE or self._whole:
                _let_go(self._file)
            if error.errno not in GONE and self._whole:
                self.failure = error.strerror or first_line(error)


@contextmanager
def unbreakable_output() -> Iterator[Unbreakable]:
    """Let no error of standard output or error end the command: a run on another disk has more to lose than its text.

    Yields standard output, which knows whether a part of the text is lost.
    """
    before = sys.stdout, sys.stderr
    output, errors = Unbreakable(sys.stdout, whole=True), Unbreakable(sys.stderr)
    sys.stdout, sys.stderr = cast(Any, output), cast(Any, errors)
    try:
        yield output
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
