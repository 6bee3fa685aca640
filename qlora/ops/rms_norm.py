"""RMS normalisation by a frozen weight (Zhang & Sennrich 2019): x / sqrt(mean(x²) + eps) * weight.

The backward rebuilds from x what it needs, so x, which the residual stream holds anyway, is all that is kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Norm(NamedTuple):
    """The constants of a normalisation over the last dimension, H wide."""

    weight: Tensor
    """[H], frozen"""
    eps: float


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [..., H] -> [..., H] in x.dtype; the mean is taken in fp32 at least."""
    y: Tensor = _RMSNorm.apply(x, norm)
    return y


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """What `rms_norm` returns, unseen by autograd. Rounds where transformers' Llama does."""
    wide = x.to(_wide(x))
    return (wide * _scale(wide, norm.eps)).to(x.dtype).mul_(norm.weight)


def normalize_gradient(grad: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """dL/dx from dL/dy, both [..., H]: with u = x * scale, scale * (g w - u * mean(g w u)). Overwrites `grad`."""
    wide = x.to(_wide(x))
    scale = _scale(wide, norm.eps)
    unit = wide * scale
    grad = grad.mul_(norm.weight).to(unit.dtype)
    mean = (grad * unit).mean(-1, keepdim=True)
    return grad.sub_(unit.mul_(mean)).mul_(scale).to(x.dtype)


def _scale(wide: Tensor, eps: float) -> Tensor:
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return normalize(x, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return normalize_gradient(grad.clone(), x, ctx.norm), None
