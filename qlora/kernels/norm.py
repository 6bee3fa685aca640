"""RMS normalisation by a frozen weight (Zhang & Sennrich 2019), x / sqrt(mean(x²) + eps) * weight, and its gradient."""

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] -> [..., H] in x.dtype, weight [H]. The mean is taken in fp32 at least; rounds where Llama does."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    NORMALIZE(x.contiguous(), weight, eps, y)
    return y


def normalize_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> None:
    """dL/dx in the place of `grad`, dL/dy; [..., H] both. `residual`, if given, is added to it.

    With u = x * scale: scale * (g w - u * mean(g w u)).
    """
    assert grad.is_contiguous()
    residual = None if residual is None else residual.contiguous()  # autograd expands gradients of sums
    NORMALIZE_GRADIENT(grad, x.contiguous(), weight, eps, residual)


def _normalize(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None:
    wide = x.to(_wide(x))
    torch.mul(wide, _scale(wide, eps), out=y).mul_(weight)


def _normalize_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    wide = x.to(_wide(x))
    scale = _scale(wide, eps)
    unit = wide * scale
    wide_grad = grad.mul_(weight).to(unit.dtype)
    mean = (wide_grad * unit).mean(-1, keepdim=True)
    wide_grad.sub_(unit.mul_(mean)).mul_(scale)
    if residual is not None:
        wide_grad.add_(residual)
    if wide_grad.dtype != grad.dtype:
        grad.copy_(wide_grad)


def _scale(wide: Tensor, eps: float) -> Tensor:
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _example(device: torch.device, dtype: torch.dtype, *, gradient: bool) -> tuple[Any, ...]:
    first, second, third = (numbers(device, dtype, 37, 520, seed=seed) for seed in range(3))
    weight = 1 + numbers(device, dtype, 520, seed=3) / 4
    return (first, second, weight, 1e-5, third) if gradient else (first, weight, 1e-5, second)


NORMALIZE = FusedOp(_normalize, "normalize", lambda device, dtype: _example(device, dtype, gradient=False))
NORMALIZE_GRADIENT = FusedOp(
    _normalize_gradient, "normalize_gradient", lambda device, dtype: _example(device, dtype, gradient=True)
)
