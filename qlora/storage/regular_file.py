"""Reads files that others made: a pipe or device among them is an error, not an endless wait for its writer."""

import errno
import io
import os
import stat
from pathlib import Path


def opened(path: Path) -> io.BufferedReader:
    """Open a file for reading bytes.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe, socket or device.
    """
    return open(path, "rb", opener=_open)


def read(path: Path) -> bytes:
    """Return the content of a file. Raises OSError as `opened`."""
    with opened(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with its line breaks as they are. Raises OSError as `opened`, and ValueError."""
    return read(path).decode()


def check(path: Path) -> None:
    """Raise OSError, as `opened`, if a library that opens the file could wait for ever."""
    opened(path).close()


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would block already here
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "Not a regular file", path)
