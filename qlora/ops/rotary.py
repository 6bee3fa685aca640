"""Rotary position embedding (Su et al. 2021): queries and keys are rotated by their position in the document.

The gradient is rotated back by the same angle, so x is not kept for the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora import kernels


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x * cos + rotate_half(x) * sin for x [B, T, heads, d].

    cos and sin [B or 1, T, d] must each have two equal halves. Differentiable in x.
    """
    y: Tensor = _Rotation.apply(x, cos, sin)
    return y


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels.rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return kernels.rotate(grad, cos, sin, -1), None, None
