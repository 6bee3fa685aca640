"""Opens a data file as a stream of UTF-8 bytes: decompresses it, and refuses other encodings by name."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qlora.errors import DataError
from qlora.storage import regular_file

BOM = b"\xef\xbb\xbf"
"""byte order mark that Windows programs put in front of UTF-8"""

MAX_ROW_BYTES = 2**28
"""longest row, after decompression; a longer one is no row of text, or a file made to fill the memory"""


def _zstd(file: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


_COMPRESSIONS: dict[bytes, tuple[str, Callable[[IO[bytes]], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}
"""first bytes of a compressed file -> its compression"""

_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed. The first bytes decide how, not the name.

    Raises:
        DataError: The file cannot be read, is damaged, or holds text that is not UTF-8. `name` is its name in messages.
    """
    compression = "file"
    try:
        with regular_file.opened(path) as file:
            head = file.read(6)
            file.seek(0)
            stream: Any = file
            for magic, (label, decompressed) in _COMPRESSIONS.items():
                if head.startswith(magic):
                    compression, stream = f"{label} file", decompressed(file)
            with io.BufferedReader(stream) if stream is not file else file as buffered:
                _check_encoding(buffered.peek(4)[:4], name)
                yield buffered
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{name}: the {compression} is damaged ({error}); download it again") from error
    except OSError as error:
        if error.strerror is None:  # from a decompressor, not from the disk
            raise DataError(f"{name}: the {compression} is damaged ({error}); download it again") from error
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) without the line break, from 1. A BOM at the start of a line, left where files were joined,
    is removed.

    Raises:
        DataError: A line is longer than MAX_ROW_BYTES.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise too_large(f"{name}:{number}")
        yield number, line.removeprefix(BOM).rstrip(b"\r\n")


def too_large(origin: str) -> DataError:
    """Return the error for a row of more than MAX_ROW_BYTES."""
    return DataError(f"{origin}: a row of more than {MAX_ROW_BYTES >> 20} MiB; split it into several rows")


def not_utf8(error: UnicodeDecodeError) -> str:
    """Describe the first byte that is not UTF-8, and say what to do."""
    byte = foreign(error.object[error.start : error.start + 1])
    return f"byte {error.start + 1} is {byte}; save the file as UTF-8"


def foreign(byte: bytes) -> str:
    """Describe a byte that is not UTF-8, with the letter that it probably is."""
    letter = byte.decode("cp1252", errors="ignore") or byte.decode("latin-1")
    return f"0x{byte.hex().upper()}" + (
        f" ({letter} in Latin-1 or Windows-1252)" if letter.isprintable() else ""
    )


def _check_encoding(head: bytes, name: str) -> None:
    encoding = _OTHER_ENCODINGS.get(head[:2])
    if encoding is None and len(head) == 4 and head.count(0) == 2 and (head[0] == 0) != (head[1] == 0):
        encoding = "UTF-16"  # without a BOM: every second byte of Latin letters and brackets is zero
    if encoding or head == b"\0\0\xfe\xff":
        raise DataError(
            f"{name}: the text is {encoding or 'UTF-32'}; save the file as UTF-8, for example with "
            f"`iconv -f {encoding or 'UTF-32'} -t UTF-8`"
        )
