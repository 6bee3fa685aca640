"""A frozen linear with VeRA's update as one autograd function (Kopiczko et al. 2023, arXiv:2310.11454, equation 2).

For rows x, with A and B frozen and the vectors d and b trained:
    y = W x + bias + b u    u = B t    t = d l    l = A x
    db = sum of dy u over the tokens    dt = B^T (b dy)    dd = sum of dt l over the tokens    dx = W^T dy + A^T (d dt)

The backward needs l [N, rank] only: neither the input, because A is frozen, nor u, which it computes again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.ops.products import Linear
from qlora.quantization.nf4 import autocast, dense


def vera_linear(x: Tensor, linear: Linear, a: Tensor, b: Tensor, scale_d: Tensor, scale_b: Tensor) -> Tensor:
    """Apply a frozen linear with VeRA's update to x [..., in], in x.dtype.

    Args:
        x: the input.
        linear: constants of the linear.
        a: frozen A [rank, in].
        b: frozen B [out, rank].
        scale_d: d [rank] in any float dtype.
        scale_b: b [out] in any float dtype.

    Returns:
        [..., out].
    """
    linear.assert_frozen()
    y: Tensor = _VeraLinear.apply(autocast(x), linear, a, b, scale_d, scale_b)
    return y.view(*x.shape[:-1], y.shape[-1])


class _VeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linear: Linear, a: Tensor, b: Tensor, scale_d: Tensor, scale_b: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        bias = None if linear.bias is None else linear.bias.to(rows.dtype)
        low = linear.dropped(rows) @ a.to(rows.dtype).T  # [N, rank]
        update = (low * scale_d.to(rows.dtype)) @ b.to(rows.dtype).T
        y = F.linear(rows, dense(linear.weight, linear.state, rows.dtype), bias)
        y.addcmul_(update, scale_b.to(rows.dtype))
        # Attributes, not saved tensors: they are constants of the run, and hooks on saved tensors must not move them
        ctx.linear, ctx.a, ctx.b, ctx.shape = linear, a, b, x.shape
        ctx.save_for_backward(low, scale_d, scale_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, scale_d, scale_b = ctx.saved_tensors
        linear, dtype = ctx.linear, grad.dtype
        a, b, d = ctx.a.to(dtype), ctx.b.to(dtype), scale_d.to(dtype)
        d_scale_b = ((low * d) @ b.T).mul_(grad).sum(0, dtype=_wide(dtype)).to(scale_b.dtype)
        inner = (grad * scale_b.to(dtype)) @ b  # dt [N, rank]
        d_scale_d = (inner * low).sum(0, dtype=_wide(dtype)).to(scale_d.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dense(linear.weight, linear.state, dtype)
            inner.mul_(d)
            dx = dx.addmm_(inner, a) if linear.dropout is None else dx.add_(linear.dropped(inner @ a))
            dx = dx.view(ctx.shape)
        return dx, None, None, None, d_scale_d, d_scale_b


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
