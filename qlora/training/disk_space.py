"""The disk space that a run takes, compared with what is free before the run begins."""

from pathlib import Path

from torch import Tensor

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.errors import SaveError
from qlora.recipe.sizes import unit_for
from qlora.storage.folders import free_bytes
from qlora.training.session import Session


def check(session: Session, output: Path) -> None:
    """Check that the checkpoints and the result fit on the disk, and warn if only some of them do.

    Args:
        session: the prepared run.
        output: its folder, which can exist. What an earlier run holds there counts as free, because a new run replaces
            it and a resumed one goes on to rotate its checkpoints.

    Raises:
        SaveError: not even one checkpoint and the result fit.
    """
    weights = sum(tensor.nbytes for tensor in _result(session))
    result = (
        weights if session.recipe.training.result == "last" else 3 * weights
    )  # the best, and one being written
    checkpoint = weights + sum(tensor.nbytes for tensor in session.optimizer.state().values())
    free = free_bytes(output) + sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    keep = session.recipe.training.keep_checkpoints
    unit = unit_for(checkpoint)
    if free < checkpoint + result:
        raise SaveError(
            f"output: a checkpoint takes {unit.text(checkpoint)} and the result {unit.text(result)}, but the disk of "
            f"{output} has {unit.text(free)} free. Make room, or choose another folder with output=..."
        )
    # A new checkpoint is written before the oldest is removed
    if session.recipe.training.save_every and free < (keep + 1) * checkpoint + result:
        session.startup.warn(
            f"{keep} checkpoints of {unit.text(checkpoint)}, one more while it is written, and the result do not fit "
            f"on the disk of {output}, which has {unit.text(free)} free. Make room, or set training.keep_checkpoints"
        )


def _result(session: Session) -> list[Tensor]:
    """Return the tensors of the trained weights."""
    if session.recipe.adapter.facts.frozen_base:
        return list(trainable_parameters(session.model).values())
    return list(session.model.parameters())
