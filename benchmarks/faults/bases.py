"""Damage the folder of a base at random, and see what a run says to each.

    python -m benchmarks.faults.bases [--count 300] [--seed 0] [--seconds 60]

Each case is a copy of the bundled base with one change: a file removed, emptied, cut, with a flipped bit, or with
another value somewhere in its JSON. A process of its own then loads configuration, tokenizer and base. Allowed are a
base that loads, and an error for the user that names the damaged file; a traceback, a hang or an error without the
file is a fault. Prints one JSON line per fault, and the counts.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.child import outcome_of
from qlora import bundled

VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 10**9, 1e308, "", "x", "llama", [], [1], {}, {"a": 1}, "🙂" * 50, float("nan"),
]  # fmt: skip
"""values that replace one of the JSON's own"""


def main() -> int:
    """Run the command line; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="a case that takes longer hangs")
    arguments = parser.parse_args()
    import qlora.model.load  # noqa: F401 - once, for all children

    counts = Counter[str]()
    for number in range(arguments.seed, arguments.seed + arguments.count):
        with tempfile.TemporaryDirectory() as work:
            folder = shutil.copytree(bundled.path("bundled/base"), Path(work) / "base")
            what = damage(folder, random.Random(number))
            outcome = outcome_of(partial(load, folder), arguments.seconds)
            kind = judge(outcome, what)
            counts[kind] += 1
            if kind not in ("loads", "named"):
                print(
                    json.dumps({"case": number, "kind": kind, "what": what, "said": outcome[1][-600:]}),
                    flush=True,
                )
    print(dict(counts), file=sys.stderr)
    return int(set(counts) - {"loads", "named"} != set())


def damage(folder: Path, rng: random.Random) -> str:
    """Change one file of the folder; return its name and what was done."""
    file = rng.choice(sorted(folder.iterdir()))
    change: Callable[[Path, random.Random], str] = rng.choice(
        [remove, cut, flip, flip, another_value, another_value]
    )
    if change is another_value and file.suffix != ".json":
        change = flip_header
    return f"{file.name}: {change(file, rng)}"


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


def another_value(file: Path, rng: random.Random) -> str:
    """Replace a random value in the JSON."""
    content = json.loads(file.read_text())
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        keys = (
            value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        )
        for key in list(keys)[:40]:
            places.append((value, key))
            collect(value[key])

    collect(content)
    holder, key = rng.choice(places)
    holder[key] = rng.choice(VALUES)
    file.write_text(json.dumps(content))
    return f"{key!r} set to {str(holder[key])[:40]!r}"


def load(folder: Path) -> None:
    """Load the base as a run does."""
    from qlora.model.load import load_base, load_config, load_tokenizer
    from qlora.recipe import Base

    base = Base(model=str(folder), compute_dtype="float32")
    config = load_config(base)
    tokenizer = load_tokenizer(base)
    tokenizer.encode("Do you repair lamps? <s> äöü 🙂")
    load_base(base, config=config)


def judge(outcome: tuple[str, str], what: str) -> str:
    """Return loads, named, unnamed, traceback or hang."""
    kind, said = outcome
    if kind == "user error":
        return "named" if what.partition(":")[0] in said else "unnamed"
    return {"done": "loads"}.get(kind, kind)


if __name__ == "__main__":
    sys.exit(main())
