"""RMS normalisation with a frozen weight (Zhang & Sennrich 2019): x / sqrt(mean(x²) + eps) * weight.

A norm that subtracts the mean first is layer normalisation (`layer_norm`). Only x is kept for the backward, which
recomputes everything else. The residual stream holds x anyway.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.kernels import normalize, normalize_gradient
from qlora.ops.layer_norm import layer_normalize, layer_normalize_gradient


class Norm(NamedTuple):
    """Constants of a normalisation over the last dimension, of size H."""

    weight: Tensor
    """[H], frozen"""
    eps: float
    offset: float = 0.0
    """added to the weight"""
    rounds_late: bool = False
    """True to round after the product with the weight, not before it"""
    centred: bool = False
    """True to subtract the mean first, as layer normalisation does; it has no offset and rounds late"""


def normalized(x: Tensor, norm: Norm | None) -> Tensor:
    """Normalise x [..., H]; return x itself without a norm. Not differentiable by autograd."""
    if norm is None:
        return x
    weight, eps, offset, rounds_late, centred = norm
    return layer_normalize(x, weight, eps) if centred else normalize(x, weight, eps, offset, rounds_late)


def input_gradient(grad: Tensor, x: Tensor, norm: Norm | None, residual: Tensor | None = None) -> None:
    """Overwrite `grad`, the gradient of `normalized(x, norm)`, with the gradient of x; add `residual` if given."""
    if norm is not None and norm.centred:
        layer_normalize_gradient(grad, x, norm.weight, norm.eps, residual)
    elif norm is not None:
        normalize_gradient(grad, x, norm.weight, norm.eps, norm.offset, residual)
    elif residual is not None:
        grad.add_(residual)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """Normalise x [..., H], in x.dtype; the mean is computed in at least fp32. Differentiable."""
    y: Tensor = _RMSNorm.apply(x, norm)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return normalized(x, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = grad.clone(memory_format=torch.contiguous_format)
        input_gradient(dx, x, ctx.norm)
        return dx, None
