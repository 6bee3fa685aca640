"""Rotary position embedding (Su et al. 2021): queries and keys are rotated by their position in the document.

The gradient is rotated back by the same angle, so x is not kept for the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora import kernels


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, in_pairs: bool = False) -> Tensor:
    """Rotate the first features of x [B, T, heads, d], see `kernels.rotate`. Differentiable in x.

    Args:
        x: queries or keys.
        cos, sin: [B or 1, T, r], with r up to d; the other features stay as they are.
        in_pairs: True if features 2i and 2i + 1 form a pair, False if i and i + r/2 do.
    """
    y: Tensor = _Rotation.apply(x, cos, sin, in_pairs)
    return y


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, in_pairs: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.in_pairs = in_pairs
        return kernels.rotate(x, cos, sin, 1, in_pairs=in_pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return kernels.rotate(grad, cos, sin, -1, in_pairs=ctx.in_pairs), None, None, None
