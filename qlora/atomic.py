"""A file that is written whole or not at all."""

import os
from pathlib import Path

from qlora.errors import SaveError


def write(path: Path, content: bytes) -> None:
    """Put `content` in place of the file `path`: a reader finds the old file or the new one, never a part.

    Raises:
        SaveError: it cannot be written; the old file stays.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror}") from error
