"""Random damage to the bytes of a file and to the values of a JSON file."""

import json
import random
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 1.5, 10**9, 10**40, 1e308, "", "x", "llama", "1", [], [1], {}, {"a": 1}, "🙂" * 50,
    "a\x1b[2Jb", float("nan"), float("inf"),
]  # fmt: skip
"""values that replace a value of a file"""


def damage_bytes(file: Path, rng: random.Random) -> str:
    """Remove, empty, cut or extend the file, or flip one of its bits; return what was done."""
    return rng.choice([remove, cut, cut, flip, flip, flip, extend])(file, rng)


def remove(file: Path, rng: random.Random) -> str:
    """Remove the file."""
    file.unlink()
    return "removed"


def cut(file: Path, rng: random.Random) -> str:
    """Cut the file at a random place, which can be its start."""
    whole = file.read_bytes()
    kept = rng.choice([0, rng.randrange(len(whole)), rng.randrange(min(200, len(whole)))])
    file.write_bytes(whole[:kept])
    return f"cut after {kept} bytes"


def flip(file: Path, rng: random.Random, limit: int | None = None) -> str:
    """Flip a random bit."""
    whole = bytearray(file.read_bytes())
    place, bit = rng.randrange(min(len(whole), limit or len(whole))), rng.randrange(8)
    whole[place] ^= 1 << bit
    file.write_bytes(whole)
    return f"bit {bit} of byte {place} flipped"


def flip_header(file: Path, rng: random.Random) -> str:
    """Flip a random bit in the first bytes, which describe the tensors of a safetensors file."""
    return flip(file, rng, limit=4000)


def extend(file: Path, rng: random.Random) -> str:
    """Append random bytes."""
    added = rng.randbytes(rng.choice([1, 100]))
    file.write_bytes(file.read_bytes() + added)
    return f"{len(added)} bytes appended"


def another_value(file: Path, rng: random.Random) -> str:
    """Replace a random value in the JSON."""
    content = json.loads(file.read_text())
    what = replace_value(content, rng)
    file.write_text(json.dumps(content))
    return what


def replace_value(content: Any, rng: random.Random) -> str:
    """Replace a random value inside a dictionary or list by one of VALUES; return what was done."""
    holder, key = rng.choice(places(content))
    holder[key] = rng.choice(VALUES)
    return f"{key!r} set to {str(holder[key])[:40]!r}"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return (holder, key) of the values inside a dictionary or list, at most 40 of each."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in list(keys)[:40]:
        found += [(value, key), *places(value[key])]
    return found
