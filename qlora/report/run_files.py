"""The files of a run, finished or not, as far as they can be read: damage is a remark, not an error."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, RecipeError, first_line
from qlora.recipe import Recipe
from qlora.recipe.versions import NewerRecipe
from qlora.report import history
from qlora.report.history import History
from qlora.storage import manifest, regular_file
from qlora.storage.json_files import without_checksum

MARKS = ("run.json", "metrics.jsonl", "result.json", "facts.json")
"""files that mark a folder as a run; one of them is enough"""

RESULTS = ("adapter", "model")

_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass
class RunFiles:
    """One run, read from its folder."""

    folder: Path
    recipe: Recipe | None = None
    """None if it is missing or cannot be read"""
    history: History = field(default_factory=lambda: History([], [], []))
    result: Mapping[str, Any] | None = None
    """content of result.json; None while the run is unfinished"""
    facts: Mapping[str, Any] | None = None
    """content of facts.json; None in a run of an earlier version"""
    memory: Mapping[str, Any] | None = None
    """content of memory.json; None without a forecast"""
    fingerprint: str | None = None
    """of all rows, training and held out, from the manifest of the result; None without one"""
    checkpoint: int | None = None
    """step of the newest checkpoint"""
    begun: bool = True
    """False if only the folder has been made"""
    earlier_version: bool = False
    """True if an earlier version of qlora wrote the run"""
    damage: list[str] = field(default_factory=list)
    """a sentence for each file that cannot be used"""

    @property
    def status(self) -> str:
        """The state of the run in a few words."""
        words = [self._progress, *(["earlier version"] if self.earlier_version else [])]
        return ", ".join([*words, *(["damaged"] if self.damage else [])])

    @property
    def _progress(self) -> str:
        if not self.begun:
            return "not begun"
        if self.result is not None:
            return "finished" if self.result["steps"] == self.result["total_steps"] else "ended early"
        # A stop saves a checkpoint after the last step; a run that goes on, or that was killed, is ahead of its newest
        stopped = self.history.last_step and self.checkpoint == self.history.last_step
        return "stopped" if stopped else "unfinished"


def read_runs(folders: list[Path]) -> list[RunFiles]:
    """Read each of these folders once, in this order.

    Raises:
        ModelError: some of them are no runs; the message names them all.
    """
    wrong = [folder for folder in folders if not any((folder / name).is_file() for name in MARKS)]
    if wrong:
        raise ModelError("\n".join(map(_no_run, wrong)))
    places: dict[Path, Path] = {}
    for folder in folders:
        places.setdefault(folder.resolve(), folder)
    return [_read(folder) for folder in places.values()]


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder. Pass folders of runs, for example runs/quickstart"
    run = folder.resolve().parent
    if folder.name in RESULTS and any((run / name).is_file() for name in MARKS):
        return f"{folder}: is the result of a run, not the run. Pass {folder.parent}"
    return f"{folder}: no run here. Pass folders of runs, for example runs/quickstart"


def _read(folder: Path) -> RunFiles:
    run = RunFiles(folder)
    identity = _object(run, "run.json")
    if identity is None and not run.damage:
        run.damage.append(f"{folder / 'run.json'}: missing. `qlora train RECIPE --resume` writes it again")
    run.begun = not (identity or {}).get("starting", False)
    if not run.begun:  # all other files belong to the run before
        return run
    run.recipe = _recipe(run)
    run.result = _result(run, identity)
    run.history = _history(run)
    run.facts = _object(run, "facts.json") or (run.result or {}).get("facts")
    run.memory = _object(run, "memory.json")
    run.fingerprint = _fingerprint(folder)
    steps = [_CHECKPOINT.fullmatch(place.name) for place in folder.glob("checkpoints/step-*")]
    run.checkpoint = max((int(step[1]) for step in steps if step), default=None)
    run.earlier_version |= run.result is not None and run.facts is None
    return run


def _history(run: RunFiles) -> History:
    file = run.folder / "metrics.jsonl"
    try:
        if file.is_file():
            return history.read(file)
        if run.result is not None:
            run.damage.append(f"{file}: missing, so the run has no curves. Restore it from a copy")
    except OSError as error:
        run.damage.append(f"{file}: {error.strerror}")
    return History([], [], [])


def _recipe(run: RunFiles) -> Recipe | None:
    file = run.folder / "recipe.yaml"
    try:
        recipe = Recipe.recorded(file)
        run.earlier_version = not file.read_text().startswith("version:")
    except NewerRecipe as error:
        run.damage.append(str(error))
    except (RecipeError, OSError) as error:
        text = str(error)
        run.damage.append(text if text.startswith(str(file)) else f"{file}: {first_line(error)}")
    else:
        return recipe
    return None


def _result(run: RunFiles, identity: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the content of result.json if it belongs to the run and has the numbers that a comparison needs."""
    result = _object(run, "result.json")
    if result is None:
        return None
    file, run_id = run.folder / "result.json", (identity or {}).get("run_id")
    if run_id is not None and result.get("run_id", run_id) != run_id:
        run.damage.append(f"{file}: belongs to another run. Remove it")
        return None
    numbers = [result.get(key) for key in ("steps", "total_steps", "seconds")]
    numbers += [result.get(key) or 0 for key in ("loss_before", "loss_after", "result_step")]
    if not all(isinstance(number, int | float) for number in numbers):
        run.damage.append(f"{file}: a value is missing or wrong. Restore it from a copy")
        return None
    return result


def _fingerprint(folder: Path) -> str | None:
    for name in RESULTS:
        try:
            value = manifest.read(folder / name).get("data")
        except (OSError, ValueError):
            continue
        return value if isinstance(value, str) else None
    return None


def _object(run: RunFiles, name: str) -> dict[str, Any] | None:
    """Return the object in a file of the run; None if there is no such file, or it is damaged, which is noted."""
    file = run.folder / name
    try:
        return without_checksum(json.loads(regular_file.read(file)))
    except FileNotFoundError:
        return None
    except RecursionError:
        problem = "nested too deep"
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    run.damage.append(f"{file}: damaged ({problem}). Restore it from a copy")
    return None
