"""Reads rows, each with its file and line, from a local file, a bundled file or the Hugging Face hub."""

import csv
import gzip
import hashlib
import io
import json
import re
import stat
import textwrap
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qlora.errors import DataError
from qlora.formats import BadRow, Row

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Supported file types; all but Parquet also gzipped."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """A row, or the reason why it could not be read."""

    origin: str
    """file:line; without lines, "file:row N" or "id[split]:row N". Counted from 1."""
    row: Row | BadRow


def read(source: str, split: str = "train", limit: int | None = None) -> Iterator[Record]:
    """Yield the first `limit` rows of a data set, in order.

    Args:
        source: a local JSON, JSONL, CSV, TSV or Parquet file, `bundled/...`, or the id of a data set on the hub:
            `owner/name`, or `owner/name/configuration` if it has several configurations.
        split: split of a data set on the hub.
        limit: number of rows to read; None reads all.

    Raises:
        DataError: The source as a whole cannot be read. A single bad row becomes a Record with a BadRow.
    """
    place = _place(source)
    records = _file(place, source) if isinstance(place, Path) else _hub(*place, split)
    return islice(records, limit)


def identity(source: str, split: str = "train") -> str | None:
    """Return an identifier of a data set's content: SHA-256 of a file, or the fingerprint from `datasets`.

    None if there is none or the file cannot be read; `read` reports the reason. Arguments as in `read`.
    """
    place = _place(source)
    if not isinstance(place, Path):
        return getattr(_hub_rows(*place, split), "_fingerprint", None)
    try:
        if not place.is_file():
            return None
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def _place(source: str) -> Path | tuple[str, str | None]:
    """Resolve a source to a file, or to a data set's id on the hub and its configuration."""
    if source.startswith("bundled/"):
        from qlora import bundled

        return bundled.path(source)
    path = Path(source).expanduser()
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or path.exists():
        return path
    return hub_id["name"], hub_id["configuration"]


# A name with the suffix of a data file means a file, even if the file does not exist.
_HUB_ID = re.compile(
    r"(?!.*\.(?:json|jsonl|ndjson|csv|tsv|parquet|txt)(?:\.gz)?$)"
    r"(?P<name>\w[\w.-]*(?:/[\w.-]+)?)(?:/(?P<configuration>[\w.-]+))?"
)


def _file(path: Path, name: str) -> Iterator[Record]:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name!r}: {reason}{_neighbours(path.parent)}") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{name!r} is a folder; give the path of one file{_neighbours(path)}")
    if not stat.S_ISREG(mode):
        raise DataError(f"{name!r} is not a regular file; save its content as a regular file")
    readers: dict[str, Callable[[Path, str], Iterator[Record]]] = {
        ".json": _json,
        ".jsonl": _json,
        ".ndjson": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in readers:
        raise DataError(
            f"{name!r}: unsupported file type; use {', '.join(SUFFIXES)} (all but Parquet also as .gz)"
        )
    return readers[suffix](path, name)


def _neighbours(folder: Path) -> str:
    """List the data files in a folder, as the end of an error message."""
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir() if path.name.removesuffix(".gz").endswith(SUFFIXES))
    return f". Data files in {folder}: {', '.join(names[:8])}" if names else ""


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes. Gzip is detected by the first bytes, not by the name."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with io.BufferedReader(gzip.GzipFile(fileobj=file)) if zipped else file as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: the gzip file is damaged ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _json(path: Path, name: str) -> Iterator[Record]:
    """Read JSON lines or one JSON list. The first character decides, because both can be named .json."""
    with _opened(path, name) as stream:
        first = next((line for line in stream if line.removeprefix(_BOM).strip()), b"")
    listed = first.removeprefix(_BOM).lstrip().startswith(b"[")
    return (_json_list if listed else _json_lines)(path, name)


def _json_lines(path: Path, name: str) -> Iterator[Record]:
    with _opened(path, name) as stream:
        for number, line in enumerate(stream, 1):
            text = (line.removeprefix(_BOM) if number == 1 else line).rstrip(b"\r\n")
            if text.strip():
                yield Record(f"{name}:{number}", _json_row(text))


def _json_row(line: bytes) -> Row | BadRow:
    try:
        return _object(_DECODER.decode(line.decode()))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1} of the line")
    except BadRow as error:
        return error
    except json.JSONDecodeError as error:
        return BadRow("broken JSON", f"{error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow("broken JSON", "nested too deeply")
    except ValueError as error:  # an integer of more than 4300 digits
        return BadRow("broken JSON", str(error))


def _json_list(path: Path, name: str) -> Iterator[Record]:
    with _opened(path, name) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    position, line, line_start, counted = _skip(text, text.index("[") + 1), 1, 0, 0
    while not text.startswith("]", position):
        breaks = text.count("\n", counted, position)
        if breaks:
            line, line_start = line + breaks, text.rindex("\n", counted, position) + 1
        # If rows share a line, the column identifies the row.
        column = f":{position - line_start + 1}" if counted and not breaks else ""
        origin, counted = f"{name}:{line}{column}", position
        try:
            row, position = _list_item(text, position)
            position = _skip(text, position)
            if not text.startswith((",", "]"), position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            # The start of the next row is unknown, so `on_bad_row: skip` cannot help.
            raise DataError(
                f"{origin}: broken JSON: {error}. The rest of the list cannot be read; correct the file"
            ) from None
        yield Record(origin, row)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
    if text[position + 1 :].strip():
        raise DataError(f"{name}: there is text after the closing bracket of the list; remove it")


_SPACE = re.compile(r"\s*")


def _skip(text: str, position: int) -> int:
    """Return the position of the first character from `position` on that is not white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _list_item(text: str, start: int) -> tuple[Row | BadRow, int]:
    """Parse the row that starts here; return it and its end position."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return _object(value), end
    except BadRow as error:
        return error, json.JSONDecoder().raw_decode(text, start)[1]


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow("not an object", "a row must have the form {...}")
    return value


def _no_constant(name: str) -> None:
    raise BadRow("not a number", f"{name} is not valid JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow("duplicate key", repr(next(name for name in names if names.count(name) > 1)))
    return row


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)


def _csv(path: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(2**30)  # the default limit of 128 KiB is too short for some documents
    with _opened(path, name) as stream:
        # Bytes that are not UTF-8 become lone surrogates, which `formats` reports for each row.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{name}:1: two columns have the same name: {', '.join(header)}; rename one")
        while True:
            origin = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Record(origin, BadRow("broken CSV", str(error)))
                continue
            if cells is None:
                break
            if cells:  # empty for a blank line
                yield Record(origin, _csv_row(header, cells))


def _csv_row(header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow("wrong number of columns", f"{len(cells)}, the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{name}:row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{name}: cannot be read as Parquet: {error}. Write or download the file again"
        ) from error


def _hub(name: str, configuration: str | None, split: str) -> Iterator[Record]:
    for number, row in enumerate(_hub_rows(name, configuration, split), 1):
        yield Record(f"{name}[{split}]:row {number}", row)


def _hub_rows(name: str, configuration: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 400)
        raise DataError(
            f"{name!r} is not a local file, and cannot be loaded as a data set from the hub (split {split!r}): "
            f"{reason}\nCheck the spelling and the network. Without a network, copy a file of the data set to "
            "this machine and set data.source to its path"
        ) from error
