"""Sizes of memory as people write them."""

import re

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


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GiB, 80GB or 512MiB (24G is 24GB). Raises ValueError with what is wrong.

    >>> parse_size("24GiB") == 24 * 2**30
    True
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match and match[2].upper().replace("K", "Ki" if match[3] else "k")
    if match and unit and match[3] and not unit.endswith("i"):
        unit += "i"
    # a bare number is refused: 24 would be 24 bytes, and nobody means that
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size of memory; write it as 24GiB, 80GB or 512MiB")
    return int(float(match[1]) * UNITS[unit])
