"""Reads rows from CSV and TSV files, whose first line names the columns."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from qlora.data.files.opened import MAX_ROW_BYTES, foreign, opened
from qlora.data.files.record import Record
from qlora.errors import DataError
from qlora.formats import BadRow, Row

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read(path: Path, name: str) -> Iterator[Record]:
    """Read the rows of a CSV file, or of a TSV file if its name says so. A row begins in the line that names it.

    Raises:
        DataError: The file cannot be read, its first line is broken, two columns have the same name, or another
            character separates the columns.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # the default limit of 128 KiB is too short for some documents
    separator = "\t" if ".tsv" in path.name.lower() else ","
    with opened(path, name) as stream:
        # Bytes that are not UTF-8 become lone surrogates, which `formats` reports for each row.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{name}:1: broken CSV in the names of the columns: {_reason(error)}") from None
        _check_header(header, separator, name)
        while True:
            origin = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Record(origin, BadRow("broken CSV", _reason(error)))
                continue
            if cells is None:
                break
            if cells:  # empty for a blank line
                yield Record(origin, _row(header, cells))


def _reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote that is opened here is not closed, so all lines after it are lost"
    return str(error)


def _check_header(header: list[str], separator: str, name: str) -> None:
    if len(set(header)) != len(header):
        raise DataError(f"{name}:1: two columns have the same name: {', '.join(header)}; rename one")
    if len(header) == 1:
        counts = {sign: header[0].count(sign) for sign in _SEPARATORS if sign != separator}
        likely = max(counts, key=lambda sign: counts[sign])
        if counts[likely]:
            suffix = {",": ".csv", "\t": ".tsv"}.get(likely)
            write = f"name the file {suffix}" if suffix else f"save it with {_SEPARATORS[separator]}"
            raise DataError(
                f"{name}:1: the columns are separated by {_SEPARATORS[likely]}, not by {_SEPARATORS[separator]}: "
                f"{header[0]}; {write}"
            )


def _row(header: list[str], cells: list[str]) -> Row | BadRow:
    if [cell.removeprefix("\ufeff") for cell in cells] == header:
        return BadRow("repeated header", "the file is several files joined; delete this line")
    if len(cells) != len(header):
        return BadRow("wrong number of columns", f"{len(cells)}, the header has {len(header)}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        byte = bytes([ord(error.object[error.start]) - 0xDC00])
        return BadRow("not UTF-8", f"contains {foreign(byte)}; save the file as UTF-8")
    return dict(zip(header, cells, strict=True))
