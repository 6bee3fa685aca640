"""Atomic, durable writes of single files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import SaveError


def write(path: Path, content: bytes) -> None:
    """Replace the file `path` by one with this content, atomically: readers see the old file or the new one.

    Raises:
        SaveError: the file cannot be written or flushed to disk. `path` is then still the whole old or new file.
    """
    try:
        with replacing(path) as temporary:
            # O_EXCL and O_NOFOLLOW: always write to a new file, never through a link to another place
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
    """Replace the file `path` atomically by the file that the body writes to the yielded path.

    If the body raises, the old file stays.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)  # left by a killed process, or a planted link
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the rename is durable only after the folder is synced


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk, so that they survive a power cut.

    Raises:
        OSError: the flush fails; the error names the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
