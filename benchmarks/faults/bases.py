"""Folders of bases with one change: a file removed, emptied, cut, with a flipped bit, or another value in its JSON.

Configuration, tokenizer and base are loaded as a run does. A flipped bit inside a tensor changes the base, which no
file tells, so a base that loads is clean.
"""

import random
import shutil
from functools import partial
from pathlib import Path

from benchmarks.faults.child import ended
from benchmarks.faults.damage import another_value, cut, flip, flip_header, remove
from benchmarks.faults.sweep import SECONDS, Case, Judged, Sweep, judge
from qlora import bundled


def open_bases(shared: Path) -> Case:
    """Return the case; it shares nothing."""
    import qlora.model.load  # noqa: F401 - once, for all children

    return case


def case(rng: random.Random, folder: Path) -> Judged:
    """Damage a copy of the bundled base and load it."""
    base = shutil.copytree(bundled.path("bundled/base"), folder / "base")
    file = rng.choice(sorted(base.iterdir()))
    change = rng.choice([remove, cut, flip, flip, another_value, another_value])
    if change is another_value and file.suffix != ".json":
        change = flip_header
    what = f"{file.name}: {change(file, rng)}"
    return judge(ended(partial(load, base), SECONDS), [file.name], what)


def load(folder: Path) -> None:
    """Load the base as a run does."""
    from qlora.model.load import load_base, load_config, load_tokenizer
    from qlora.recipe import Base

    base = Base(model=str(folder), compute_dtype="float32")
    config = load_config(base)
    tokenizer = load_tokenizer(base)
    tokenizer.encode("Do you repair lamps? <s> äöü 🙂")
    load_base(base, config=config)


SWEEP = Sweep("bases", "damaged folders of bases", 300, open_bases)
