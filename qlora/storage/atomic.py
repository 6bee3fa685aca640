"""A file that is written whole or not at all, and survives a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import SaveError


def write(path: Path, content: bytes) -> None:
    """Put `content` in place of the file `path`: a reader sees the old file or the new one, never a part.

    Raises:
        SaveError: it cannot be written, or not be made to survive a power cut. Either file is there, whole.
    """
    try:
        with replacing(path) as temporary:
            # O_EXCL and O_NOFOLLOW: what is written goes into a new file here, and never through a link elsewhere.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o666)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Put the file that the body writes at the path it is given in place of `path`, once it is safely on disk.

    When the body raises, the old file stays. Raises OSError where the disk refuses.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or a link that somebody laid there
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # a new name is safe only once its folder is


def sync(path: Path) -> None:
    """Make what a file holds, or which names a folder holds, survive a power cut. Raises OSError with the path."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
