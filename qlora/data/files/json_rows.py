"""Reads rows from JSON lines or from one JSON list, never more than one row of it at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qlora.data.files.opened import BOM, MAX_ROW_BYTES, lines, not_utf8, opened, too_large
from qlora.data.files.record import Record
from qlora.errors import DataError
from qlora.formats import FIELDS, BadRow, Row
from qlora.storage import regular_file

_HEAD_BYTES = 2**16
_CHUNK_BYTES = 2**18
_SPACE = re.compile(r"\s*")
_KEY_OF_A_LIST = re.compile(r'"([^"\\]+)"\s*:\s*\[\s*\{')


def read(path: Path, name: str) -> Iterator[Record]:
    """Read JSON lines or one JSON list. The first character decides, because both can be named .json.

    Raises:
        DataError: The file cannot be read; a list is broken, so that its next row is unknown; or the file is an object
            that spans several lines.
    """
    with opened(path, name) as stream:
        head = stream.read(_HEAD_BYTES).replace(BOM, b"").lstrip()
    if head.startswith(b"["):
        return _list(path, name)
    if head.startswith(b"{"):
        _refuse_object_of_several_lines(head, name)
    return _lines(path, name)


def count_lines(path: Path) -> int | None:
    """Return the number of JSON lines, or None if the file is compressed, a list or cannot be read."""
    try:
        with regular_file.opened(path) as stream:
            if not stream.readline(_HEAD_BYTES).removeprefix(BOM).lstrip().startswith(b"{"):
                return None
            stream.seek(0)
            return sum(1 for line in iter(lambda: stream.readline(MAX_ROW_BYTES), b"") if line.strip())
    except OSError:
        return None


def _refuse_object_of_several_lines(head: bytes, name: str) -> None:
    """Raise DataError if the first object spans several lines: each of them would be a broken row."""
    first, ended, rest = head.partition(b"\n")
    last = first.rstrip()[-1:]
    if not ended:
        return
    if last != b"[" and (last not in (b"{", b",") or rest.lstrip().startswith(b"{")):
        return
    keys = _KEY_OF_A_LIST.findall(head.decode(errors="ignore"))
    key = next((key for key in keys if key not in FIELDS), None)
    if key is not None:
        raise DataError(
            f"{name}: the file is one object, and the rows are a list under its key {key!r}. Save that list alone, for "
            f"example with `jq '.{key}' {Path(name).name} > rows.json`"
        )
    raise DataError(
        f"{name}: an object spans several lines. Write each row on one line, for example with "
        f"`jq -c . {Path(name).name} > rows.jsonl`, or write one list of all rows"
    )


def _lines(path: Path, name: str) -> Iterator[Record]:
    with opened(path, name) as stream:
        for number, line in lines(stream, name):
            if line.strip():
                yield Record(f"{name}:{number}", _row(line))


def _row(line: bytes) -> Row | BadRow:
    try:
        return _object(_DECODER.decode(line.decode()))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", not_utf8(error))
    except BadRow as error:
        return error
    except json.JSONDecodeError as error:
        return BadRow("broken JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow("broken JSON", _reason(error))


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # A plain ValueError is an integer of more than 4300 digits
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _list(path: Path, name: str) -> Iterator[Record]:
    with opened(path, name) as stream:
        text = _Text(stream, name)
        text.take("[")
        while not text.take("]"):
            origin = text.row_place()
            try:
                row = text.item()
                if not text.take(",") and text.next != "]":
                    raise json.JSONDecodeError("Expecting ',' or ']'", "", 0)
            except (ValueError, RecursionError) as error:
                # The start of the next row is unknown, so `on_bad_row: skip` cannot help.
                reason = _reason(error)
                raise DataError(
                    f"{origin}: broken JSON: {reason}. The rest of the list cannot be read; correct the file"
                ) from None
            yield Record(origin, row)
        if text.next == "[":
            raise DataError(f"{text.place}: a second list begins here; write the rows of both in one list")
        if text.next:
            raise DataError(f"{text.place}: there is text after the closing bracket of the list; remove it")


class _Text:
    """The text of a JSON file from a moving position on, of which only a part is in memory."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._position, self._ended = "", 0, False
        self._line, self._column = 1, 1
        self._line_of_row = 0

    @property
    def place(self) -> str:
        """The position as file:line."""
        return f"{self._name}:{self._line}"

    def row_place(self) -> str:
        """Return the position as file:line, with the column if another row of the list begins in the same line."""
        shared, self._line_of_row = self._line_of_row == self._line, self._line
        return f"{self.place}:{self._column}" if shared else self.place

    @property
    def next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None
            self._move(match.end())
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read()

    def take(self, character: str) -> bool:
        """Move behind `character` and white space if it comes next; return True if it did."""
        if self.next != character:
            return False
        self._move(self._position + 1)
        _ = self.next  # skips white space, so that the place of the next row is right
        return True

    def item(self) -> Row | BadRow:
        """Parse the value at the position and move behind it.

        Raises:
            ValueError: The value is broken; RecursionError: it is nested too deeply.
            DataError: The value is longer than MAX_ROW_BYTES.
        """
        while True:
            try:
                row, end = _item(self._text, self._position)
            except json.JSONDecodeError as error:
                # an open string, or an error within the last characters: the text may only be cut
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut:
                    raise
            else:
                if self._ended or end < len(self._text):
                    self._move(end)
                    return row
            if len(self._text) - self._position > MAX_ROW_BYTES:
                raise too_large(self.place)
            self._read()

    def _move(self, end: int) -> None:
        if breaks := self._text.count("\n", self._position, end):
            self._line += breaks
            self._column = end - self._text.rindex("\n", self._position, end)
        else:
            self._column += end - self._position
        self._position = end

    def _read(self) -> None:
        """Drop the text before the position and append at least as much as is left, so that retries stay linear."""
        rest = self._text[self._position :]
        chunk = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._ended = not chunk
        try:
            self._text, self._position = rest + self._decode(chunk, self._ended), 0
        except UnicodeDecodeError as error:
            line = self._line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._name}:{line}: not UTF-8: {not_utf8(error)}") from None


def _item(text: str, start: int) -> tuple[Row | BadRow, int]:
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
