"""RMS normalisation x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019) with a frozen weight; its gradient."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


def normalize(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds_late: bool = False
) -> Tensor:
    """Normalise x [..., H] and multiply by `weight` [H] + `offset`; the result has x.dtype, the mean at least fp32.

    `rounds_late`: round after the product with the weight (Gemma), not before it (Llama).
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    form = NORMALIZE_LATE if rounds_late else NORMALIZE
    form(x.contiguous(), weight, eps, y, offset, rounds_late)
    return y


def normalize_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> None:
    """Overwrite `grad`, dL/dy [..., H], with dL/dx + residual (no residual if None).

    With g = dL/dy, u = x * scale and w = weight + offset: dL/dx = scale * (g w - u * mean(g w u)).
    """
    assert grad.is_contiguous()
    # autograd gives expanded gradients for sums
    residual = None if residual is None else residual.contiguous()
    NORMALIZE_GRADIENT(grad, x.contiguous(), weight, eps, residual, offset)


def _normalize(
    x: Tensor, weight: Tensor, eps: float, y: Tensor, offset: float = 0.0, rounds_late: bool = False
) -> None:
    wide = x.to(_wide(x))
    in_place = rounds_late and wide is not x
    unit = torch.mul(wide, _scale(wide, eps), out=wide if in_place else y)
    torch.mul(unit, _shifted(weight, offset), out=y)


def _normalize_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float = 0.0
) -> None:
    wide = x.to(_wide(x))
    scale = _scale(wide, eps)
    unit = wide * scale
    wide_grad = grad.mul_(_shifted(weight, offset)).to(unit.dtype)
    mean = (wide_grad * unit).mean(-1, keepdim=True)
    wide_grad.sub_(unit.mul_(mean)).mul_(scale)
    if residual is not None:
        wide_grad.add_(residual)
    if wide_grad.dtype != grad.dtype:
        grad.copy_(wide_grad)


def _scale(wide: Tensor, eps: float) -> Tensor:
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _shifted(weight: Tensor, offset: float) -> Tensor:
    return weight.to(_wide(weight)) + offset if offset else weight


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _example(device: torch.device, dtype: torch.dtype, rounds_late: bool) -> tuple[Any, ...]:
    x, y = (numbers(device, dtype, 37, 520, seed=seed) for seed in range(2))
    return x, _weight(device, dtype), 1e-5, y, 0.5, rounds_late


def _example_of_gradient(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    grad, x, residual = (numbers(device, dtype, 37, 520, seed=seed) for seed in range(3))
    return grad, x, _weight(device, dtype), 1e-5, residual, 0.5


def _weight(device: torch.device, dtype: torch.dtype) -> Tensor:
    return 1 + numbers(device, dtype, 520, seed=3) / 4


NORMALIZE = FusedOp(_normalize, "normalize", partial(_example, rounds_late=False))
NORMALIZE_LATE = FusedOp(_normalize, "normalize", partial(_example, rounds_late=True))
"""compiled as a separate kernel, so checked separately"""
NORMALIZE_GRADIENT = FusedOp(_normalize_gradient, "normalize_gradient", _example_of_gradient)
