"""Memory sizes: parsed from text such as 24GiB, and printed in GiB, or in MiB for small runs."""

import re
from dataclasses import dataclass

UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?")


MOST_BYTES = 2**60


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 24GiB, 80GB or 512MiB (24G is 24GB).

    Raises:
        ValueError: the text is not a size with a unit, or more than `MOST_BYTES`.

    Examples:
        >>> parse_size("24GiB") == 24 * 2**30
        True
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match and match[2].upper().replace("K", "Ki" if match[3] else "k")
    if match and unit and match[3] and not unit.endswith("i"):
        unit += "i"
    # a number without a unit is rejected: 24 would be 24 bytes, which is surely a mistake
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a memory size; write it with a unit, such as 12GiB or 512MiB")
    size = float(match[1]) * UNITS[unit]
    if size > MOST_BYTES:
        raise ValueError(f"{text[:20]!r} is too large for a memory size; write one such as 12GiB or 512MiB")
    return int(size)


@dataclass(frozen=True)
class Unit:
    """A unit of memory. A table, picture or page uses only one, so that its numbers can be compared."""

    name: str
    unit_bytes: int

    def number(self, size_bytes: int) -> str:
        """Return the size with two decimals, for a table column: `7.12`; `<0.01` if it would round to zero.

        Examples:
            >>> unit_for(2**33).number(7_645_041_787)
            '7.12'
        """
        value = size_bytes / self.unit_bytes
        return "<0.01" if 0 < value < 0.005 else f"{value:,.2f}"

    def text(self, size_bytes: int) -> str:
        """Return the size with three significant digits and its unit, for a sentence.

        Examples:
            >>> unit_for(2**33).text(7_645_041_787), unit_for(2**33).text(4_600_000)
            ('7.12 GiB', '0.00428 GiB')
        """
        return f"{three_digits(size_bytes / self.unit_bytes)} {self.name}"


def three_digits(value: float) -> str:
    """Format a number >= 0 with three significant digits and no exponent: `12.6`, `0.0712`, `1,235`."""
    if not value:
        return "0"
    if value < 1e-4:
        return "<0.0001"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


MIB, GIB = Unit("MiB", 2**20), Unit("GiB", 2**30)


def unit_for(size_bytes: int) -> Unit:
    """Return GiB for sizes of at least 1 GiB, else MiB."""
    return GIB if size_bytes >= GIB.unit_bytes else MIB


def parameters_text(number: int) -> str:
    """Return a number of parameters with three digits and a unit, such as 6.74 B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)
