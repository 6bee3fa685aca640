"""A run's folder: claimed once, never overwritten in silence, and never lost halfway.

    runs/<name>/run.json recipe.yaml metrics.jsonl checkpoints/ adapter/ (or model/) result.json

run.json names the run, and is written first. While it holds the mark `starting`, the folder belongs to a new run,
and whatever else lies there does not count. So replacing run.json is the one instant in which --fresh gives up the
old run: killed before it, the old run is all there; killed after it, the next start clears the rest away.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, RecipeError
from qlora.recipe import Recipe, Training
from qlora.recipe.versions import NewerRecipe, translated
from qlora.storage import atomic, folders, manifest
from qlora.tracking import BACKENDS
from qlora.training import checkpoint

# What a run writes, and therefore all that --fresh may remove.
CONTENTS = (
    "run.json", "recipe.yaml", "metrics.jsonl", "result.json", "checkpoints", "adapter", "model", *BACKENDS,
    "report.html", "memory.json", "memory.md", "memory.png",
)  # fmt: skip

RESULTS = ("adapter", "model")

# Of these, files that nobody else writes: where one lies, the folders beside it are a run's too.
TELLTALES = {"metrics.jsonl", "result.json", "memory.json", "report.html"}

# How a run's folders name what is in them.
INSIDE = {
    "checkpoints": re.compile(r"(\.tmp-|\.trash-)?step-\d+"),
    **{name: backend.files for name, backend in BACKENDS.items()},
}

# What a process at work, or one that was killed, leaves beside it.
TRACES = {".lock", *(f"{prefix}{name}" for prefix in (folders.TEMPORARY, folders.TRASH) for name in CONTENTS)}

# Keys that a resumed run may change: they do not touch the mathematics of the steps already taken.
MAY_CHANGE = {
    "output", "tracking", "training.max_steps", "training.epochs", "training.eval_every", "training.save_every",
    "training.keep_checkpoints", "training.samples", "training.sample_tokens", "training.activation_offloading",
    "base.embedding",
}  # fmt: skip

_warn = logging.getLogger("qlora").warning


@dataclass(frozen=True)
class RunFolder:
    """A claimed folder and the id that marks everything in it as this run's."""

    path: Path
    run_id: str
    plan: dict[str, Any] | None = None
    """what a memory budget came to at the run's beginning; a resumed run keeps to it"""

    def write_result(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        content = json.dumps({**summary, "run_id": self.run_id}, indent=2) + "\n"
        atomic.write(self.path / "result.json", content.encode())


@dataclass(frozen=True)
class _Earlier:
    """The run that a folder holds already."""

    run_id: str
    plan: dict[str, Any] | None
    source: Path
    """the file that names it: run.json or, where that is missing or damaged, a checkpoint's manifest or result.json"""
    starting: bool = False
    """nothing but run.json is this run's yet"""


def finished(path: Path) -> dict[str, Any] | None:
    """The summary of the finished run in `path`, or None.

    Raises:
        ModelError: result.json or run.json is damaged, and nothing else in the folder can stand in for it.
    """
    file = path / "result.json"
    if not file.is_file():
        return None
    earlier = _earlier(path)
    if earlier is not None and earlier.starting:
        return None
    try:
        summary = _object(file)
    except ValueError as error:
        raise damaged_result(file, str(error)) from error
    # Runs of earlier versions have no id in their result.
    return summary if earlier is None or summary.get("run_id", earlier.run_id) == earlier.run_id else None


def damaged_result(file: Path, why: str) -> ModelError:
    """Build the error for a result.json that cannot be right."""
    return ModelError(
        f"{file}: damaged ({why}). Put it back from a copy, or remove it and go on from the newest checkpoint with "
        "--resume"
    )


def earlier_plan(path: Path) -> dict[str, Any] | None:
    """The plan that the run in `path` was begun with; None if there was none, or no run.

    Raises:
        ModelError: as `finished`, of run.json.
    """
    earlier = _earlier(path)
    return None if earlier is None else earlier.plan


def check_output(recipe: Recipe, path: Path, *, resume: bool, fresh: bool) -> bool:
    """Whether `path` holds a run already. Writes nothing.

    Raises:
        RecipeError: it holds a run and neither `resume` nor `fresh` was asked for; it holds something else; or the run
            to resume was made by a recipe that computes something else.
        ModelError: the run to resume is damaged.
    """
    if path.exists() and not path.is_dir():
        raise RecipeError(f"output: {path} is a file, not a folder")
    names = {child.name for child in path.iterdir()} if path.is_dir() else set()
    existing = not names.isdisjoint(CONTENTS)
    if not _is_ours(path, names):
        raise RecipeError(
            f"output: {path} exists and is not a run of qlora's. Choose another with output=..."
        )
    if existing and not (resume or fresh):
        raise RecipeError(
            f"output: {path} already holds a run. Go on with it (--resume), replace it (--fresh), or choose "
            "another folder with output=..."
        )
    if existing and resume:
        _check_same(recipe, path)
    return existing


def claim(
    recipe: Recipe, path: Path, *, resume: bool, fresh: bool, plan: dict[str, Any] | None = None
) -> RunFolder:
    """Take `path` for this run; the caller holds its lock.

    A new folder is made; an existing run needs `resume` (go on with it) or `fresh` (remove it and start again).
    A new run that was killed while it was starting is started again by either.

    Raises:
        QloraError: as `check_output`.
        SaveError: the folder cannot be written. The run in it is the old one, or the new one at its beginning.
    """
    existing = check_output(recipe, path, resume=resume, fresh=fresh)
    earlier = _earlier(path) if existing and resume else None
    if earlier is None or earlier.starting:
        run = RunFolder(path, secrets.token_hex(8) if earlier is None else earlier.run_id, plan)
        _start(run, recipe)
    else:
        run = RunFolder(path, earlier.run_id, earlier.plan if plan is None else plan)
        for name in RESULTS:
            folders.recover(path, name)
        folders.recover(path / "checkpoints", "step-*")
        _go_on(run, recipe, earlier.source)
    return run


def _start(run: RunFolder, recipe: Recipe) -> None:
    """Make the folder that of a new run, so that a kill at any instant leaves the old run or the beginning of this."""
    with folders.save_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        atomic.sync(run.path.parent)
    # The old run, if there is one, ends with this file.
    atomic.write(run.path / "run.json", _json({"run_id": run.run_id, "starting": True}))
    kept = {"run.json", "recipe.yaml"}  # together they mark the folder as a run's, whatever else lies in it
    if (run.path / "recipe.yaml").is_dir():  # nothing can take its place
        kept.remove("recipe.yaml")
    folders.clear(run.path, [name for name in CONTENTS if name not in kept])
    atomic.write(run.path / "recipe.yaml", recipe.to_yaml().encode())
    atomic.write(run.path / "run.json", _json({"run_id": run.run_id, "plan": run.plan}))


def _go_on(run: RunFolder, recipe: Recipe, source: Path) -> None:
    """Write what has changed since the run began, or was damaged; a file that is right is not touched."""
    if source != run.path / "run.json":
        _warn(f"{run.path / 'run.json'} was missing or damaged; it is written again, with the id in {source}")
    if _recorded(run.path / "recipe.yaml") is None:
        _warn(f"{run.path / 'recipe.yaml'} was missing or damaged; it is written again")
    elif recipe.adapter.dropout and not (run.path / "recipe.yaml").read_text().startswith("version:"):
        _warn(
            "an earlier version of qlora began this run and drew dropout by micro-batch; from here on it is drawn by "
            "row, so the adapter is not the one that the earlier version would have ended with"
        )
    _replace(run.path / "run.json", _json({"run_id": run.run_id, "plan": run.plan}))
    _replace(run.path / "recipe.yaml", recipe.to_yaml().encode())


def _is_ours(path: Path, names: set[str]) -> bool:
    """Whether a run may work in a folder of these names: it holds a run, or nothing but what runs leave."""
    if {"run.json", "recipe.yaml"} <= names or any(path.glob("checkpoints/step-*/manifest.json")):
        return True  # whatever else the user keeps there
    left = names - TRACES
    if not left <= set(CONTENTS):
        return False
    return not left.isdisjoint(TELLTALES) or all(_written_by_a_run(path / name) for name in left)


def _written_by_a_run(path: Path) -> bool:
    """Whether a file or folder of a run's name is a run's, and not somebody's own that has the same name."""
    if not path.is_dir():
        return path.name not in (*RESULTS, *INSIDE)
    pattern = INSIDE.get(path.name)
    inside = [child.name for child in path.iterdir()]
    return not inside or (pattern is not None and all(map(pattern.fullmatch, inside)))


def _earlier(path: Path) -> _Earlier | None:
    """Find the run in a folder: by run.json, else by its newest checkpoint, else by result.json.

    Raises:
        ModelError: there is something to lose, and nothing tells which run it belongs to.
    """
    file = path / "run.json"
    problem = "missing"
    if os.path.lexists(file):
        try:
            return _named(_object(file), file)
        except ValueError as error:
            problem = f"damaged ({error})"
    if (folder := checkpoint.newest(path, checksums=False)) is not None:
        plan = _plan(checkpoint.read_state(folder))
        return _Earlier(manifest.read(folder)["run_id"], plan, folder / manifest.MANIFEST)
    result = path / "result.json"
    try:
        return _named(_object(result), result)
    except ValueError:
        pass
    if problem == "missing" and not any(
        (path / name).exists() for name in ("adapter", "model", "result.json")
    ):
        return None  # nothing has been trained
    raise ModelError(
        f"{file}: {problem}, and there is no checkpoint that tells which run this is. Put the file back from a copy, "
        "or start again with --fresh"
    )


def _named(content: Mapping[str, Any], source: Path) -> _Earlier:
    """What run.json (or result.json) says of its run. Raises ValueError if it cannot be right."""
    run_id, plan, starting = content.get("run_id"), _plan(content), content.get("starting", False)
    if not (isinstance(run_id, str) and run_id and isinstance(starting, bool)):
        raise ValueError("it names no run")
    if plan is not None and not _is_plan(plan):
        raise ValueError("its plan holds settings that training does not take")
    return _Earlier(run_id, plan, source, starting)


def _plan(content: Mapping[str, Any]) -> Any:
    """The plan in run.json or in a checkpoint's state, which an earlier version may have written."""
    plan = content.get("plan")
    return translated("training", plan) if isinstance(plan, dict) else plan


def _is_plan(plan: Any) -> bool:
    """Whether these are settings of `training` that its section takes."""
    if not (isinstance(plan, dict) and plan.keys() <= Training.model_fields.keys()):
        return False
    try:
        Training.model_validate(plan, strict=True)
    except ValueError:
        return False
    return True


def _check_same(recipe: Recipe, path: Path) -> None:
    earlier = _earlier(path)
    if earlier is None or earlier.starting:
        return
    before, may_change = _recipe_before(path, earlier)
    changed = [] if before is None else list(_differences(before, recipe.to_dict(), may_change))
    if changed:
        lines = "\n".join(f"  {key}: {old!r} then, {new!r} now" for key, old, new in changed)
        raise RecipeError(
            f"{path}: the recipe has changed since the run began, so it cannot go on as the same run:\n{lines}\n"
            "Put the old values back, or start again with --fresh or another output"
        )


def _recipe_before(path: Path, earlier: _Earlier) -> tuple[dict[str, Any] | None, set[str]]:
    """Find the settings that the run was begun with, and the keys that may differ now; None if no step was taken.

    Where recipe.yaml is missing or damaged, the newest checkpoint has a copy, in which the plan is carried out.
    """
    file = path / "recipe.yaml"
    if (recipe := _recorded(file)) is not None:
        return recipe.to_dict(), MAY_CHANGE
    folder = checkpoint.newest(path, run_id=earlier.run_id, checksums=False)
    if folder is None:
        return None, MAY_CHANGE
    copy = folder / ("adapter" if (folder / "adapter").is_dir() else "model") / "recipe.yaml"
    if not copy.is_file():
        raise ModelError(
            f"{file}: missing or damaged, and {folder} has no copy of it. Put it back, or start again with --fresh"
        )
    planned = {"training.memory", *(f"training.{key}" for key in earlier.plan or {})}
    return Recipe.recorded(copy).to_dict(), MAY_CHANGE | planned


def _recorded(file: Path) -> Recipe | None:
    """The recipe in a file; None if it is missing or damaged."""
    try:
        return Recipe.recorded(file)
    except NewerRecipe:
        raise
    except RecipeError:
        return None


def _differences(
    old: dict[str, Any], new: dict[str, Any], may_change: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        name = f"{prefix}{key}"
        if name in may_change:
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from _differences(old[key], new[key], may_change, f"{name}.")
        elif old.get(key) != new.get(key):
            yield name, old.get(key), new.get(key)


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, whatever is wrong with it."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _replace(file: Path, content: bytes) -> None:
    """Write a file, unless it holds just that."""
    if not (file.is_file() and file.read_bytes() == content):
        atomic.write(file, content)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
