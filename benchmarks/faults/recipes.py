"""Recipes with one mistake: a wrong value, a misspelled or repeated key, bad bytes, bombs of anchors and nesting.

`qlora check` reads each. A recipe that is accepted must hold what its text says: a value that becomes another one, or a
misspelled key that is ignored, is a fault.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import damage, ground
from benchmarks.faults.child import command
from benchmarks.faults.sweep import SECONDS, Case, Judged, Sweep, judge


def open_recipes(shared: Path) -> Case:
    """Write the base and return the case."""
    ground.import_all()
    base = ground.tiny_base(shared / "base")

    def case(rng: random.Random, folder: Path) -> Judged:
        recipe, file = ground.settings(base, folder / "run"), folder / "recipe.yaml"
        if rng.random() < 0.5:
            return _value(rng, recipe, file)
        name = rng.choice(sorted(TEXTS))
        text = json.dumps(recipe, indent=2, ensure_ascii=False)
        file.write_bytes(TEXTS[name](rng, text))
        judged = judge(command(["check", file], SECONDS), [file.name, *NAMED], name)
        if judged.kind == "works" and name in REFUSED:
            return Judged("accepted", name, file.read_text(errors="replace")[:500])
        return judged

    return case


def _value(rng: random.Random, recipe: dict[str, Any], file: Path) -> Judged:
    """Replace a value of the recipe, or misspell a key."""
    holder, key = rng.choice(damage.places(recipe))
    path = _path(recipe, holder, key)
    if rng.random() < 0.3:
        typo = rng.choice([f"{key}s", key[:-1] or "x", key.upper(), f" {key}x", key.replace("_", "-") + "-"])
        holder[typo] = holder.pop(key)
        end = command(["check", ground.write_recipe(file, recipe)], SECONDS)
        judged = judge(end, [file.name], f"{path} misspelled as {typo!r}")
        return Judged("accepted", judged.what) if judged.kind == "works" else judged
    value = rng.choice(damage.VALUES)
    holder[key] = value
    end = command(["check", ground.write_recipe(file, recipe)], SECONDS)
    judged = judge(end, [file.name, path], f"{path} set to {str(value)[:40]!r}")
    if judged.kind == "works" and not isinstance(value, dict):
        from qlora.recipe import Recipe

        read: Any = Recipe.load(file).to_dict()
        for part in path.split("."):
            read = read[part]
        if value is not None and not _same(read, value):
            return Judged("changed", f"{judged.what}, read as {read!r}")
    return judged


def _path(content: dict[str, Any], holder: Any, key: Any) -> str:
    """Return the path of a key in nested dictionaries, such as training.max_steps."""
    if holder is content:
        return str(key)
    return next(
        f"{name}.{_path(inner, holder, key)}"
        for name, inner in content.items()
        if isinstance(inner, dict) and any(place is holder for place, _ in damage.places(inner))
    )


def _same(read: Any, value: Any) -> bool:
    if isinstance(read, bool) != isinstance(value, bool):
        return False
    if isinstance(value, float) and math.isnan(value):
        return isinstance(read, float) and math.isnan(read)
    return bool(read == value)


def _line(rng: random.Random, text: str, change: Callable[[str], str]) -> str:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(1, len(lines) - 1)
    return "".join([*lines[:at], change(lines[at]), *lines[at + 1 :]])


def _bytes_at(rng: random.Random, text: str, inserted: bytes) -> bytes:
    whole = text.encode()
    at = rng.randrange(len(whole))
    return whole[:at] + inserted + whole[at:]


def _bomb(merge: bool) -> bytes:
    lines = ["a0: &a0 {x: y}" if merge else "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 30):
        other = ", ".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} " + (f"{{<<: [{other}]}}" if merge else f"[{other}]"))
    return "\n".join(lines).encode()


def _many_digits(rng: random.Random, text: str) -> bytes:
    return _line(rng, text, lambda line: f"{line.split(':')[0]}: {'9' * 5000},\n").encode()


def _with_memory(text: str, memory: str) -> bytes:
    return text.replace('"device"', f'"memory": "{memory}", "device"').encode()


TEXTS: dict[str, Callable[[random.Random, str], bytes]] = {
    "a flipped bit": lambda rng, text: _flipped(rng, text.encode()),
    "cut": lambda rng, text: text.encode()[: rng.randrange(len(text))],
    "bytes that are not UTF-8": lambda rng, text: _bytes_at(rng, text, rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"])),
    "a control character": lambda rng, text: _bytes_at(rng, text, bytes([rng.randrange(9)])),
    "a repeated line": lambda rng, text: _line(rng, text, lambda line: line.rstrip(",\n") + ",\n" + line).encode(),
    "a tab": lambda rng, text: _line(rng, text, lambda line: "\t" + line).encode(),
    "UTF-16": lambda rng, text: text.encode("utf-16"),
    "deep lists": lambda rng, text: b"[" * rng.choice([100, 10_000, 1_000_000]),
    "deep dictionaries": lambda rng, text: b"{a: " * rng.choice([100, 10_000, 100_000]),
    "deep keys": lambda rng, text: "\n".join(" " * n + f"k{n}:" for n in range(rng.choice([100, 3000]))).encode(),
    "a bomb of anchors": lambda rng, text: _bomb(merge=False),
    "a bomb of merges": lambda rng, text: _bomb(merge=True),
    "an anchor of itself": lambda rng, text: b"base: &a\n  model: *a\n",
    "a tag of Python": lambda rng, text: b"base: !!python/object/apply:os.system ['true']\n",
    "two documents": lambda rng, text: (text + "\n---\n" + text).encode(),
    "many digits": lambda rng, text: _many_digits(rng, text),
    "a size of many digits": lambda rng, text: _with_memory(text, "9" * 400 + "GiB"),
    "nothing": lambda rng, text: b"",
    "a number alone": lambda rng, text: b"42",
    "random bytes": lambda rng, text: rng.randbytes(200),
}  # fmt: skip

NAMED = ("base.model", "data.source", "data.held_out", "output")
"""keys whose values can be wrong and yet fit the recipe: names of files and folders"""

REFUSED = {
    "bytes that are not UTF-8", "deep lists", "deep dictionaries", "deep keys", "a bomb of anchors", "a bomb of merges",
    "an anchor of itself", "a tag of Python", "two documents", "many digits", "a size of many digits", "nothing",
    "a number alone", "random bytes",
}  # fmt: skip
"""damage that no recipe survives"""


def _flipped(rng: random.Random, whole: bytes) -> bytes:
    at = rng.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]


SWEEP = Sweep("recipes", "recipes with a mistake", 1000, open_recipes)
