"""Reads plain text files: a blank line ends a document; in a file without blank lines, each line is a document."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from qlora.data.files.opened import lines, not_utf8, opened
from qlora.data.files.record import Record
from qlora.formats import BadRow

COLUMN = "text"
"""column of the rows, the field of the formats text and completion"""


def read(path: Path, name: str) -> Iterator[Record]:
    """Read the documents of a text file, each as a row with the column `text`.

    Raises:
        DataError: The file cannot be read.
    """
    paragraphs = _has_blank_lines(path, name)
    with opened(path, name) as stream:
        numbered = lines(stream, name)
        for blank, group in groupby(numbered, key=lambda line: not line[1].strip()):
            if not blank:
                for document in [list(group)] if paragraphs else ([line] for line in group):
                    yield _row(document, name)


def _has_blank_lines(path: Path, name: str) -> bool:
    """Return True if a blank line separates two lines of text."""
    with opened(path, name) as stream:
        kinds = (kind for kind, _ in groupby(bool(line.strip()) for _, line in lines(stream, name)))
        return sum(1 for kind, _ in zip(kinds, range(4), strict=False) if kind) > 1


def _row(document: list[tuple[int, bytes]], name: str) -> Record:
    origin = f"{name}:{document[0][0]}"
    try:
        return Record(origin, {COLUMN: b"\n".join(line for _, line in document).decode()})
    except UnicodeDecodeError as error:
        return Record(origin, BadRow("not UTF-8", not_utf8(error)))
