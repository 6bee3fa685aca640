"""Rotary position embedding (Su et al. 2021) of the first r of d features.

In Llama's form features i and i + r/2 are a pair, in GLM's and Cohere's 2i and 2i + 1.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, *, in_pairs: bool = False) -> Tensor:
    """Rotate the first r features of x as a contiguous tensor; `direction` -1 rotates back.

    Args:
        x: [B, T, heads, d], of any layout.
        cos, sin: [B or 1, T, r]; both features of a pair must have the same angle.
        direction: 1 or -1.
        in_pairs: True if features 2i and 2i + 1 form a pair, False if i and i + r/2 do.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    work = ROTATE_PAIRS if in_pairs else ROTATE
    work(x, cos.contiguous(), sin.contiguous(), direction, y, in_pairs)
    return y


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, y: Tensor, in_pairs: bool) -> None:
    width = cos.shape[-1]
    y[..., width:] = x[..., width:]
    x, y = x[..., :width], y[..., :width]
    cos, sin, half = cos.unsqueeze(-2), sin.unsqueeze(-2), width // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if in_pairs else (slice(half), slice(half, None))
    torch.mul(x, cos, out=y)
    y[..., first].addcmul_(x[..., second], sin[..., first], value=-direction)
    y[..., second].addcmul_(x[..., first], sin[..., second], value=direction)


def _example(device: torch.device, dtype: torch.dtype, in_pairs: bool) -> tuple[Any, ...]:
    # [B, T, heads, d], as attention's backward gives it; the last 8 features are not rotated
    x = numbers(device, dtype, 2, 3, 19, 48).transpose(1, 2)
    angles = numbers(device, torch.float32, 2, 19, 20, seed=1)
    angles = angles.repeat_interleave(2, -1) if in_pairs else angles.repeat(1, 1, 2)
    return x, angles.cos().to(dtype), angles.sin().to(dtype), -1, torch.empty_like(x.contiguous()), in_pairs


ROTATE = FusedOp(_rotate, "rotate", lambda device, dtype: _example(device, dtype, in_pairs=False))
ROTATE_PAIRS = FusedOp(_rotate, "rotate", lambda device, dtype: _example(device, dtype, in_pairs=True))
