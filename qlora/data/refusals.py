"""Counts rows that are left out, with the first rows of each reason, and advises what to do about them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora.formats import FIELDS, FORMATS, BadRow
from qlora.recipe import Data

if TYPE_CHECKING:
    from qlora.data.reading import Reading

_SHOWN = 10  # reasons listed in an error message


@dataclass
class _Group:
    """Rows with the same reason."""

    first: str
    second: str = ""
    count: int = 1


@dataclass
class Refusals:
    """Rows that are left out, grouped by reason. Memory does not grow with their number."""

    kinds: Counter[str] = field(default_factory=Counter)
    """number of rows per kind of reason"""
    _groups: dict[str, _Group] = field(default_factory=dict)
    _listed: int = 0
    _example: Any = None  # (origin, row) of the first row that lacks a field

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.kinds.total()

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def add(self, origin: str, reason: BadRow, row: Any) -> None:
        """Count a row of the source."""
        self.kinds[reason.kind] += 1
        if self._example is None and reason.kind == "missing field" and isinstance(row, Mapping):
            self._example = origin, row
        group = self._groups.get(str(reason))
        if group is not None:
            group.count += 1
            group.second = group.second or origin
        elif len(self._groups) < _SHOWN:
            self._groups[str(reason)] = _Group(origin)
        else:
            return
        self._listed += 1

    def lines(self) -> list[str]:
        """Return a line for each of the first reasons: file:line: reason, and the number of other rows that have it."""
        lines = []
        for reason, group in self._groups.items():
            others = group.count - 1
            more = (
                f" (the same in {others} more row{'s' * (others > 1)}, next {group.second})" if others else ""
            )
            lines.append(f"  {group.first}: {reason}{more}")
        rest = self.total - self._listed
        return lines + ([f"  ... and {rest} more rows with other reasons"] if rest else [])

    def explained(self, reading: "Reading", section: Data) -> str:
        """Return the message about the bad rows of a source: totals, the first rows of each reason, and advice."""
        totals = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        lines = [f"{reading.source}: {self.total} of {reading.read} rows cannot be used: {totals}"]
        return "\n".join([*lines, *self.lines(), *self._advice(reading, section)])

    def _advice(self, reading: "Reading", section: Data) -> list[str]:
        advice = ["Correct the rows"]
        if section.on_bad_row == "error":
            advice = ["Correct the rows, or skip them with data.on_bad_row=skip"]
        if self._example is None:
            return advice
        origin, row = self._example
        if (name := _format_of(row)) == section.format:
            pairs = ", ".join(f"{field}: {column}" for field, column in section.columns.items())
            return [
                f"data.columns is {{{pairs}}}, and the row at {origin} lacks such a column; correct it.",
                *advice,
            ]
        if name is not None:
            return [f"The row at {origin} looks like data.format={name}; set that.", *advice]
        inside = [key for key, value in row.items() if key not in FIELDS and _is_list_of_rows(value)]
        if inside and reading.read == 1:
            return [f"The rows seem to be a list under the key {inside[0]!r}; save that list alone."]
        return [
            "If a field has another name in the data, set data.columns to {field: its column}.",
            "If the rows have another structure, choose another data.format.",
            *advice,
        ]


def _format_of(row: Mapping[str, Any]) -> str | None:
    """Return the first format that can parse the row."""
    for name, format in FORMATS.items():
        try:
            format.parser({})(row)
        except BadRow:
            continue
        return name
    return None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
