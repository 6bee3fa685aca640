"""A run's folder: claimed once, never overwritten in silence.

runs/<name>/recipe.yaml metrics.jsonl checkpoints/ adapter/ (or model/) result.json
"""

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import atomic
from qlora.errors import ModelError, RecipeError, SaveError
from qlora.recipe import Recipe

# What a run writes, and therefore all that --fresh may remove.
CONTENTS = (
    "recipe.yaml", "run.json", "metrics.jsonl", "result.json", "checkpoints", "adapter", "model", "wandb",
    "report.html", "memory.json", "memory.md", "memory.png",
)  # fmt: skip

# Keys that a resumed run may change: they do not touch the mathematics of the steps already taken.
MAY_CHANGE = {
    "output", "tracking", "training.max_steps", "training.epochs", "training.eval_every", "training.save_every",
    "training.keep_checkpoints", "training.samples", "training.sample_tokens", "training.offload", "base.embedding",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A claimed folder and the id that marks everything in it as this run's."""

    path: Path
    run_id: str
    plan: dict[str, Any] | None = None
    """what a memory budget came to at the run's beginning; a resumed run keeps to it"""

    def write_result(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        atomic.write(self.path / "result.json", (json.dumps(summary, indent=2) + "\n").encode())


def finished(path: Path) -> dict[str, Any] | None:
    """The summary of the finished run in `path`, or None."""
    file = path / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def earlier_plan(path: Path) -> dict[str, Any] | None:
    """The plan that the run in `path` was begun with; None if there was none, or no run."""
    file = path / "run.json"
    return json.loads(file.read_text()).get("plan") if file.is_file() else None


def check_output(recipe: Recipe, path: Path, *, resume: bool, fresh: bool) -> bool:
    """Whether `path` holds a run already. Writes nothing.

    Raises:
        RecipeError: it holds a run and neither `resume` nor `fresh` was asked for, or it holds something else.
        ModelError: the run to resume was made by a recipe that computes something else.
    """
    if path.exists() and not path.is_dir():
        raise RecipeError(f"output: {path} is a file, not a folder")
    existing = (path / "recipe.yaml").is_file() and (path / "run.json").is_file()
    if not existing and path.is_dir() and any(child.name != ".lock" for child in path.iterdir()):
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

    Raises:
        QloraError: as `check_output`.
        SaveError: the folder cannot be written.
    """
    existing = check_output(recipe, path, resume=resume, fresh=fresh)
    try:
        if existing and resume:
            run = RunFolder(path, json.loads((path / "run.json").read_text())["run_id"], plan)
        else:
            _clear(path)
            path.mkdir(parents=True, exist_ok=True)
            run = RunFolder(path, secrets.token_hex(8), plan)
        (path / "recipe.yaml").write_text(recipe.to_yaml())
        (path / "run.json").write_text(json.dumps({"run_id": run.run_id, "plan": run.plan}) + "\n")
    except OSError as error:
        raise SaveError(f"output: cannot write {error.filename or path}: {error.strerror}") from error
    return run


def _check_same(recipe: Recipe, path: Path) -> None:
    before = Recipe.recorded(path / "recipe.yaml").to_dict()
    changed = list(_differences(before, recipe.to_dict()))
    if changed:
        lines = "\n".join(f"  {key}: {old!r} then, {new!r} now" for key, old, new in changed)
        raise ModelError(
            f"{path}: the recipe has changed since the run began, so it cannot go on as the same run:\n{lines}\n"
            "Put the old values back, or start again with --fresh or another output"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Any:
    for key in {**old, **new}:
        name = f"{prefix}{key}"
        if name in MAY_CHANGE:
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from _differences(old[key], new[key], f"{name}.")
        elif old.get(key) != new.get(key):
            yield name, old.get(key), new.get(key)


def _clear(path: Path) -> None:
    for name in CONTENTS:
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
