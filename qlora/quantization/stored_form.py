"""Checks that the tensors of a checkpoint are the weights of a model: their sizes, and those of NF4's statistics.

transformers compares the shapes only of weights that it does not quantize, and bitsandbytes reads past the end of
statistics that are too short.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def why_another_weight(name: str, stored: Tensor, shape: Sequence[int]) -> str | None:
    """Say why a tensor in 16 or 32 bits is not the weight `name` of this shape; None if it is."""
    if tuple(stored.shape) == tuple(shape) and stored.is_floating_point() and stored.element_size() > 1:
        return None
    dtype = str(stored.dtype).removeprefix("torch.")
    return (
        f"{name}: the files have {list(stored.shape)} in {dtype}, and the model needs {list(shape)} in 16 or 32 bits; "
        "a part of the files is missing, or config.json belongs to another model"
    )


def why_not_whole(packed: Tensor, state: Any) -> str | None:
    """Say what of a 4-bit weight has another size than its quant state says; None if all fit together.

    Args:
        packed: its codes as bytes.
        state: bitsandbytes' quant state, with the shape of the weight.
    """
    if not state.nested and state.absmax.dtype == torch.uint8:
        return "nested_absmax is missing"
    count = state.shape.numel()
    blocks = -(count // -state.blocksize)
    sizes = {"codes": (packed.nbytes, -(count // -2)), "absmax": (state.absmax.numel(), blocks)}
    if state.nested:
        sizes["nested_absmax"] = state.state2.absmax.numel(), -(blocks // -state.state2.blocksize)
    wrong = [
        f"{found:,} {what} where {wanted:,} belong"
        for what, (found, wanted) in sizes.items()
        if found != wanted
    ]
    return f"for {list(state.shape)} in 4 bits there are {' and '.join(wrong)}" if wrong else None
