"""Trace of the memory of an optimizer update."""

from collections.abc import Mapping

import torch
from torch import nn

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.memory import inventory
from qlora.memory.inventory import Row, Rows, bytes_by_part
from qlora.memory.live import LiveBytes
from qlora.model.prepare import build_optimizer, lr_factors
from qlora.optim import Optimizer
from qlora.optim.flat import BLOCK_SIZE, CHUNK_SIZE
from qlora.recipe import Recipe

FEW_CHUNKS = 3
"""chunks of an optimizer update that run; all others are equal"""

_Kind = tuple[torch.dtype, bool, float]
"""parameters that the optimizer lays end to end: dtype, True for matrices, factor of the learning rate"""


def trace_of_update(model: nn.Module, recipe: Recipe) -> tuple[Row, Rows]:
    """Return the permanent bytes of optimizer and course over all trained parameters, and the trace of an update.

    One parameter replaces all parameters of the same dtype, weight decay and learning rate, because the optimizer lays
    them end to end anyway. It updates them in equal chunks, so a few chunks are enough.
    """
    sizes: dict[_Kind, int] = {}
    factors = lr_factors(model, recipe)
    for name, parameter in trainable_parameters(model).items():
        kind = parameter.dtype, parameter.ndim >= 2, factors[name]  # only matrices have weight decay
        sizes[kind] = sizes.get(kind, 0) - (-parameter.numel() // BLOCK_SIZE)
    course = METHODS[recipe.adapter.method].course(model, recipe.adapter, 1)
    permanent = bytes_by_part(
        [*inventory.of_optimizer(_optimizer_over(sizes, recipe)), *inventory.of_course(course)]
    )
    few = {kind: min(blocks, FEW_CHUNKS * CHUNK_SIZE // BLOCK_SIZE) for kind, blocks in sizes.items()}
    optimizer = _optimizer_over(few, recipe)
    known = list(inventory.of_optimizer(optimizer))
    with LiveBytes(known) as live:
        optimizer.clip(recipe.training.max_grad_norm)
        optimizer.step(recipe.optimizer.lr)
    return permanent, live.trace().parts - bytes_by_part(known)


def _optimizer_over(sizes: Mapping[_Kind, int], recipe: Recipe) -> Optimizer:
    """Build the recipe's optimizer over the given number of blocks of each kind."""
    whole, factors = nn.Module(), {str(number): factor for number, (*_, factor) in enumerate(sizes)}
    for number, ((dtype, is_matrix, _), blocks) in enumerate(sizes.items()):
        shape = (blocks, BLOCK_SIZE) if is_matrix else (blocks * BLOCK_SIZE,)
        whole.register_parameter(str(number), nn.Parameter(torch.empty(shape, dtype=dtype)))
    return build_optimizer(whole, recipe, factors)
