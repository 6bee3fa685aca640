"""RMS normalisation by a frozen weight (Zhang & Sennrich 2019): x / sqrt(mean(x²) + eps) * weight.

The backward rebuilds from x what it needs, so x, which the residual stream holds anyway, is all that is kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.kernels import normalize, normalize_gradient


class Norm(NamedTuple):
    """The constants of a normalisation over the last dimension, H wide."""

    weight: Tensor
    """[H], frozen"""
    eps: float


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [..., H] -> [..., H] in x.dtype; the mean is taken in fp32 at least."""
    y: Tensor = _RMSNorm.apply(x, norm)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return normalize(x, *norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = grad.clone(memory_format=torch.contiguous_format)
        normalize_gradient(dx, x, *ctx.norm)
        return dx, None
