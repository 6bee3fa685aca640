"""Out of memory, said in a way that helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora.errors import OutOfMemoryError
from qlora.recipe import Recipe


@contextmanager
def out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turns the device's shortage into an OutOfMemoryError that names the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        training = recipe.training
        advice = [
            f"training.micro_batch_size={training.micro_batch_size // 2}"
            if training.micro_batch_size > 1
            else "",
            _offload(recipe) if training.gradient_checkpointing is True else _whole_layers(recipe),
            f"data.max_length={recipe.data.max_length // 2}",
        ]
        raise OutOfMemoryError(
            f"the device is out of memory ({str(error).splitlines()[0]}). Try "
            + " or ".join(filter(None, advice))
        ) from error


def _offload(recipe: Recipe) -> str:
    return "" if recipe.training.offload else "training.offload=true"


def _whole_layers(recipe: Recipe) -> str:
    """The setting that recomputes every layer, as it fits beside the recipe's others."""
    beside = " training.mlp_checkpointing=false" if recipe.training.mlp_checkpointing else ""
    return f"training.gradient_checkpointing=true{beside}"
