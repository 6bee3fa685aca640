"""Rotary position embedding (Su et al. 2021) in Llama's half-split form: features i and i + d/2 form a pair."""

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Return x * cos + direction * rotate_half(x) * sin as a contiguous tensor; `direction` -1 rotates back.

    Args:
        x: [B, T, heads, d], of any layout.
        cos, sin: [B or 1, T, d]; the two halves of d must be equal.
        direction: 1 or -1.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    ROTATE(x, cos.contiguous(), sin.contiguous(), direction, y)
    return y


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, y: Tensor) -> None:
    cos, sin, half = cos.unsqueeze(-2), sin.unsqueeze(-2), x.shape[-1] // 2
    torch.mul(x, cos, out=y)
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = numbers(device, dtype, 2, 3, 19, 40).transpose(
        1, 2
    )  # [B, T, heads, d], as attention's backward gives it
    angles = numbers(device, torch.float32, 2, 19, 20, seed=1).repeat(1, 1, 2)
    return x, angles.cos().to(dtype), angles.sin().to(dtype), -1, torch.empty_like(x.contiguous())


ROTATE = FusedOp(_rotate, "rotate", _example)
