"""Checks before a run is continued: there is something to continue, and the new length fits what was trained."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.training import checkpoint
from qlora.training.best import Best
from qlora.training.result import TrainResult
from qlora.training.run_folder import earlier_plan, earlier_run_id

_PLANNED = "{method} plans its ranks over the whole run, so the number of steps cannot change"


@dataclass(frozen=True)
class ResumePoint:
    """The newest checkpoint of a run."""

    step: int
    total_steps: int | None
    """length of the run when the checkpoint was written; None in a checkpoint of an earlier version"""


def resume_point(recipe: Recipe, path: Path, total_steps: int) -> ResumePoint | None:
    """Return the point from which the run in `path` continues to `total_steps`; None without a checkpoint.

    Raises:
        RecipeError: the checkpoint already has more steps, or the method planned for another number of them.
        ModelError: every checkpoint is damaged.
    """
    if (folder := _newest(path)) is None:
        return None
    state = checkpoint.read_state(folder)
    if state["step"] > total_steps:
        raise RecipeError(
            f"{path}: the run has taken {state['step']:,} steps, and this recipe ends after {total_steps:,}. Set "
            "training.epochs or training.max_steps to at least as many steps, or start again with --fresh"
        )
    point = ResumePoint(state["step"], state.get("total_steps"))
    if recipe.adapter.facts.plans_its_length and point.total_steps not in (None, total_steps):
        raise RecipeError(
            f"{path}: the run began with {point.total_steps:,} steps, and now has {total_steps:,}. "
            f"{_PLANNED.format(method=recipe.adapter.method)}. Restore the old length, or start again with --fresh"
        )
    return point


def earlier(path: Path) -> tuple[dict[str, Any] | None, Path | None]:
    """Return the memory settings of the run in `path`, and an adapter folder with its initial values if it has them.

    Raises:
        ModelError: every checkpoint is damaged.
    """
    newest = _newest(path)
    return earlier_plan(path), newest / "adapter" if newest else None


def nothing_to_resume(path: Path) -> str:
    """Return the warning for `--resume` without a run or a checkpoint."""
    missing = f"{path} holds no run" if not (path / "run.json").exists() else f"{path} has no checkpoint yet"
    runs = [file.parent.name for file in path.parent.glob("*/run.json") if file.parent != path]
    near = get_close_matches(path.name, runs, n=1)
    meant = f"did you mean output={path.parent / near[0]}?" if near else "check `output` if you expected one"
    return f"nothing to resume: {missing}, so this run starts at step 0; {meant}"


def already_finished(recipe: Recipe, path: Path, steps: int, before: Recipe | None) -> str:
    """Return the warning for `--resume` of a run that has finished; `before` is the recipe in its folder `path`."""
    now = recipe.training.result
    other = before is not None and before.training.result != now
    without = f", and training.result={now} has no effect on it" if other else ""
    return f"{path}: the run is finished ({steps:,} steps); nothing is left to train{without}"


def is_longer(recipe: Recipe, outcome: TrainResult, recorded: Recipe | None) -> bool:
    """Return True if a finished run is asked for more steps, and can take them; False if it is asked for the same.

    More patience than a run had that ended early is more steps too.

    Args:
        recipe: the recipe now.
        outcome: the outcome of the finished run.
        recorded: the recipe in the run's folder; None if it cannot be read.

    Raises:
        RecipeError: the recipe asks for fewer steps, or for more and the run cannot continue.
        ModelError: every checkpoint is damaged.
    """
    now = recipe.training
    steps_per_epoch = outcome.facts["steps"]["steps_per_epoch"] if outcome.facts else None
    if now.max_steps is None and steps_per_epoch is None:  # a run of an earlier version
        before = recorded.training if recorded else None
        if before is None or (before.max_steps, before.epochs) == (None, now.epochs):
            return False
        total, wanted = None, f"training.epochs={now.epochs}"
    else:
        total = now.total_steps(steps_per_epoch or 0)
        if total == outcome.total_steps:
            return outcome.steps < total and _has_patience(recipe, outcome.run)
        key = "max_steps" if now.max_steps is not None else "epochs"
        wanted = f"training.{key}={getattr(now, key)} ({total:,} steps)"
    if (obstacle := _obstacle(recipe, outcome, total)) is not None:
        raise RecipeError(
            f"{outcome.run}: the run is finished after {outcome.steps:,} steps, but the recipe now has {wanted}. "
            f"{obstacle}. Train again with --fresh or another output, or restore the old length"
        )
    return True


def _obstacle(recipe: Recipe, outcome: TrainResult, total: int | None) -> str | None:
    """Say why a finished run cannot be continued to `total` steps; None if it can."""
    if total is not None and total < outcome.total_steps:
        return "It cannot become shorter"
    if recipe.adapter.facts.plans_its_length:
        return _PLANNED.format(method=recipe.adapter.method)
    newest = _newest(outcome.run)
    if newest is None or checkpoint.read_state(newest)["step"] != outcome.steps:
        return "Its last checkpoint, with the optimizer's state, is not there"
    return None


def _has_patience(recipe: Recipe, path: Path) -> bool:
    """Return True if a run that ended early would continue with the patience that the recipe has now."""
    folder = _newest(path)
    if folder is None:
        return False
    return not Best(**checkpoint.read_state(folder).get("best", {})).exhausted(recipe.training)


def _newest(path: Path) -> Path | None:
    """Return the newest checkpoint of the run in `path`; None without a run or a checkpoint."""
    run_id = earlier_run_id(path)
    if run_id is None:
        return None
    return checkpoint.newest(path, run_id=run_id, checksums=False, report=lambda line: None)
