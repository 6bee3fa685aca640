"""Memory of a few real steps, tensor by tensor, compared with the forecast."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora.errors import ModelError
from qlora.memory.plan import changed
from qlora.recipe import Recipe
from qlora.runtime.distributed import DataParallel
from qlora.tracking.startup import Startup, silent
from qlora.training.prepare import prepare
from qlora.training.run_folder import claim
from qlora.training.train import fit


def profile(recipe: Recipe, steps: int, *, startup: Startup | None = None) -> dict[str, Any]:
    """Train for `steps` steps, evaluations included, and return the content of memory.json.

    `startup` shows and measures the stages of the start; None shows nothing.
    The run's folder is temporary, and no tracker records the run.

    Raises:
        ModelError: the memory of this architecture cannot be forecast.
        QloraError: as `train`.
    """
    startup = startup or silent()
    with TemporaryDirectory(prefix="qlora-profile-") as folder:
        trial = _trial(recipe, steps, Path(folder) / "run")
        session = prepare(trial, DataParallel.of(trial), startup=startup, watch_all=True)
        run = claim(trial, Path(trial.output), resume=False, fresh=True)
        fit(session, run, terminal=startup.shown, trackers=False)
        content = session.memory.account()
    if content is None:
        raise ModelError(session.memory.note)
    return content


def _trial(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """Limit the recipe to a few steps, without checkpoints, samples and evaluations in between."""
    recipe = changed(recipe, max_steps=steps, eval_every=None, save_every=None, samples=0, result="last")
    warmup = min(recipe.optimizer.warmup_steps, steps - 1)
    optimizer = recipe.optimizer.model_copy(update={"warmup_steps": warmup})
    return recipe.model_copy(update={"optimizer": optimizer, "output": str(folder)})
