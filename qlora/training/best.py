"""The weights with the best evaluation, and the end of a run that no longer improves, by `training.best_by`.

    runs/<name>/best/adapter (or model), manifest.json

The folder is replaced at each evaluation with a better number, in one instant. A run that was killed after that
evaluates again, finds the same number and writes the same folder.
"""

from dataclasses import dataclass, field, replace

from qlora.errors import ModelError, SaveError
from qlora.recipe import Training
from qlora.storage import folders, manifest
from qlora.tracking import Tracker
from qlora.training.evaluation import Evaluation
from qlora.training.run_folder import RunFolder
from qlora.training.session import Session
from qlora.training.weights import read_weights, write_weights

FOLDER = "best"


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far."""

    loss: float | None = None
    """its held-out loss; None before the first evaluation"""
    step: int = 0
    """step after which it was computed"""
    since: int = 0
    """evaluations since then"""
    metrics: dict[str, float] = field(default_factory=dict)
    """its metrics"""

    def exhausted(self, training: Training) -> bool:
        """Return True if `training.patience` evaluations in a row brought nothing better."""
        return training.patience is not None and self.since >= training.patience


def compare(
    session: Session, run: RunFolder, best: Best, found: Evaluation, step: int, tracker: Tracker
) -> Best:
    """Return the better of `best` and the evaluation after `step`, whose weights are kept if they are to be the result.

    If they cannot be kept (a full disk), a note says so, and `best` stays.
    """
    follows = session.recipe.training.follows
    better = best.loss is None or follows.better(
        follows.value(found.loss, found.metrics), follows.value(best.loss, best.metrics)
    )
    if better and session.recipe.training.result == "best":
        better = session.processes.from_main(lambda: _kept(session, run, step, tracker))
    return Best(found.loss, step, metrics=found.metrics) if better else replace(best, since=best.since + 1)


def _kept(session: Session, run: RunFolder, step: int, tracker: Tracker) -> bool:
    """Keep the weights after `step` in place of earlier ones; if they cannot be written, say so and return False."""
    try:
        with folders.replacing(run.path, FOLDER) as folder:
            write_weights(session, folder / session.result_name)
            manifest.write(folder, run_id=run.run_id, step=step)
    except SaveError as error:
        number = session.recipe.training.follows
        tracker.note(f"the weights of step {step}, {number.is_best}, are not kept: {error}")
        return False
    return True


def check(session: Session, run: RunFolder, best: Best, tracker: Tracker) -> Best:
    """Return `best` if the weights of its step are kept; else say that they are not, and begin anew.

    They are missing if the run began with `training.result: last`.
    """
    if session.recipe.training.result != "best" or best.loss is None:
        return best
    if (problem := _problem(run, best.step)) is None:
        return best
    follows = session.recipe.training.follows
    tracker.note(
        f"{run.path / FOLDER}: the weights of step {best.step}, {follows.is_best} so far, are not there "
        f"({problem}). The {follows.best} from here on counts"
    )
    return Best()


def load(session: Session, run: RunFolder, best: Best) -> None:
    """Load the weights with the best evaluation into the model.

    Raises:
        ModelError: they are missing or damaged.
    """
    if (problem := _problem(run, best.step)) is not None:
        raise ModelError(
            f"{run.path / FOLDER}: {problem}. Restore it from a copy, or resume with training.result=last"
        )
    read_weights(session, run.path / FOLDER / session.result_name)


def _problem(run: RunFolder, step: int) -> str | None:
    """Say why the folder does not hold the weights of `step`; None if it does."""
    folder = run.path / FOLDER
    try:
        written = manifest.read(folder)
    except (OSError, ValueError) as error:
        return f"file {manifest.MANIFEST}: {getattr(error, 'strerror', None) or error}"
    if (written.get("run_id"), written.get("step")) != (run.run_id, step):
        return f"it is of step {written.get('step')}"
    found = manifest.problems(folder, written)
    return "; ".join(found) or None
