"""Out-of-memory errors with advice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora.errors import OutOfMemoryError
from qlora.recipe import Recipe, Training


@contextmanager
def out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turn torch's out-of-memory error into an OutOfMemoryError with settings that use less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        training = recipe.training
        advice = [
            f"training.micro_batch_size={training.micro_batch_size // 2}"
            if training.micro_batch_size > 1
            else "",
            _recompute_or_offload(training),
            f"data.max_length={recipe.data.max_length // 2}",
        ]
        raise OutOfMemoryError(
            f"the device is out of memory ({str(error).splitlines()[0]}). Try "
            + " or ".join(filter(None, advice))
        ) from error


def _recompute_or_offload(training: Training) -> str:
    if training.activation_checkpointing != "full":
        return "training.activation_checkpointing=full"
    return "" if training.activation_offloading else "training.activation_offloading=true"
