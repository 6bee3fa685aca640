"""A row and its place in the source."""

from dataclasses import dataclass

from qlora.formats import BadRow, Row


@dataclass(frozen=True, slots=True)
class Record:
    """A row, or the reason why it could not be read."""

    origin: str
    """file:line; without lines, "file:row N" or "id[split]:row N". Counted from 1."""
    row: Row | BadRow
