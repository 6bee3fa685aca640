"""Checks before a run is continued: there is something to continue, and the new length fits what was trained."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.training import checkpoint
from qlora.training.result import TrainResult
from qlora.training.run_folder import earlier_plan, earlier_run_id


@dataclass(frozen=True)
class ResumePoint:
    """The newest checkpoint of a run."""

    step: int
    total_steps: int | None
    """length of the run when the checkpoint was written; None in a checkpoint of an earlier version"""


def resume_point(path: Path, total_steps: int) -> ResumePoint | None:
    """Return the point from which the run in `path` continues to `total_steps`; None without a checkpoint.

    Raises:
        RecipeError: the checkpoint already has more steps.
        ModelError: every checkpoint is damaged.
    """
    run_id = earlier_run_id(path)
    if run_id is None:
        return None
    folder = checkpoint.newest(path, run_id=run_id, checksums=False, report=lambda line: None)
    if folder is None:
        return None
    state = checkpoint.read_state(folder)
    if state["step"] > total_steps:
        raise RecipeError(
            f"{path}: the run has taken {state['step']:,} steps, and this recipe ends after {total_steps:,}. Set "
            "training.epochs or training.max_steps to at least as many steps, or start again with --fresh"
        )
    return ResumePoint(state["step"], state.get("total_steps"))


def earlier(path: Path) -> tuple[dict[str, Any] | None, Path | None]:
    """Return the memory settings of the run in `path`, and an adapter folder with its initial values if it has them.

    Raises:
        ModelError: every checkpoint is damaged.
    """
    run_id = earlier_run_id(path)
    newest = run_id and checkpoint.newest(path, run_id=run_id, checksums=False, report=lambda line: None)
    return earlier_plan(path), newest / "adapter" if newest else None


def nothing_to_resume(path: Path) -> str:
    """Return the warning for `--resume` without a run or a checkpoint."""
    missing = f"{path} holds no run" if not (path / "run.json").exists() else f"{path} has no checkpoint yet"
    runs = [file.parent.name for file in path.parent.glob("*/run.json") if file.parent != path]
    near = get_close_matches(path.name, runs, n=1)
    meant = f"did you mean output={path.parent / near[0]}?" if near else "check `output` if you expected one"
    return f"nothing to resume: {missing}, so this run starts at step 0; {meant}"


def check_finished(recipe: Recipe, outcome: TrainResult, recorded: Recipe | None) -> None:
    """Check that a finished run is not asked for another number of steps.

    Args:
        recipe: the recipe now.
        outcome: the outcome of the finished run.
        recorded: the recipe in the run's folder; None if it cannot be read.

    Raises:
        RecipeError: the recipe asks for another length.
    """
    now = recipe.training
    steps_per_epoch = outcome.facts["steps"]["steps_per_epoch"] if outcome.facts else None
    if now.max_steps is None and steps_per_epoch is None:
        before = recorded.training if recorded else None
        same = before is None or (before.max_steps, before.epochs) == (None, now.epochs)
        wanted = f"training.epochs={now.epochs}"
    else:
        total = now.total_steps(steps_per_epoch or 0)
        same = total == outcome.total_steps
        key = "max_steps" if now.max_steps is not None else "epochs"
        wanted = f"training.{key}={getattr(now, key)} ({total:,} steps)"
    if not same:
        raise RecipeError(
            f"{outcome.run}: the run is finished after {outcome.total_steps:,} steps, but the recipe now has {wanted}. "
            "A finished run cannot be continued, because its learning rate has run its course. Train again with "
            "--fresh or another output, or restore the old length"
        )
