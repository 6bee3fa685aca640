"""A frozen linear with DoRA's update as one autograd function (Liu et al. 2024, arXiv:2402.09353, equation 5).

    W' = m V / ||V||    V = W + s B A    ||V|| [out], the norms of V's rows, over the inputs

With g = m / ||V|| and z = W x + s B A x, the output is y = g z + bias. Section 4.3 of the paper treats ||V|| as a
constant, so its gradient is left out:
    dm = sum of dy z / ||V|| over the tokens    dz = g dy    then as in LoRA, see `products`

The norms need no dense V, only products with the narrow A and B (rowsum adds over the columns):
    ||V||^2 = ||W||^2 + 2 s rowsum(W A^T * B) + s^2 rowsum(B (A A^T) * B)
W is dequantized once per pass, for the norms and the product.

g - 1 is small, and 16 bits near 1 would round it away. Therefore y is computed as z + (g - 1) z.

Dropout is PEFT's: the whole change of the layer sees the dropped input u = x * mask / (1 - rate), also its part that
rescales W x. With z = W u + s B A u:
    y = W x + (g - 1) z + s B A u + bias
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.ops.products import Linear, Update
from qlora.quantization.nf4 import autocast, dense


def dora_linear(
    x: Tensor,
    linear: Linear,
    update: Update,
    magnitude: Tensor,
    squares: Tensor,
    norms: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with DoRA's update to x [..., in], in x.dtype.

    Args:
        x: the input.
        linear: constants of the linear; its scaling is s.
        update: A [rank, in] and B [out, rank] in any float dtype.
        magnitude: m [out], fp32.
        squares: ||W||^2 [out], fp32, see `row_squares`.
        norms: ||V|| [out] if they are known, as between the tokens of a generated text; None: they are computed.

    Returns:
        [..., out].
    """
    linear.assert_frozen()
    y: Tensor = _DoraLinear.apply(autocast(x), linear, *update, magnitude, squares, norms)
    return y.view(*x.shape[:-1], y.shape[-1])


def row_squares(weight: Tensor) -> Tensor:
    """Return the squared norms [out] of the rows of a dense weight [out, in], in its dtype."""
    return torch.linalg.vector_norm(weight, dim=1).square()


def row_norms(weight: Tensor, squares: Tensor, update: Update, scaling: float) -> Tensor:
    """Return the norms [out] of the rows of W + s B A in the dtype of `squares`; zero rows get the smallest number.

    Args:
        weight: dense W [out, in]; W A^T is computed in its dtype.
        squares: the squared norms [out] of the rows of W.
        update: A and B.
        scaling: s.
    """
    assert update.a is not None
    assert update.b is not None
    crossed = (weight @ update.a.to(weight.dtype).T).to(squares.dtype)  # [out, rank]
    a, b = update.a.to(squares.dtype), update.b.to(squares.dtype)
    crossed.mul_(2 * scaling).addmm_(b, a @ a.T, alpha=scaling**2)
    # The sum can be a rounding error below zero; the bound keeps the division by a norm finite
    return (squares + (crossed * b).sum(1)).clamp_(min=0).sqrt_().clamp_(min=torch.finfo(squares.dtype).tiny)


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear: Linear,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        squares: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = dense(linear.weight, linear.state, rows.dtype)
        norms = row_norms(weight, squares, Update(a, b), linear.scaling) if known is None else known
        excess = (magnitude.to(norms.dtype) / norms - 1).to(rows.dtype)  # g - 1
        inner, narrow = linear.dropped(rows), b.to(rows.dtype).T
        low = inner @ a.to(rows.dtype).T  # [N, rank]
        z = F.linear(inner, weight).addmm_(low, narrow, alpha=linear.scaling)
        y = z
        if linear.dropout is not None:
            y = F.linear(rows, weight).addmm_(low, narrow, alpha=linear.scaling)
        y = torch.addcmul(y, z, excess)
        if linear.bias is not None:
            y.add_(linear.bias.to(y.dtype))
        # An attribute, not saved tensors: constants of the run, and hooks on saved tensors must not move them
        ctx.linear = linear
        ctx.save_for_backward(x, a, b, magnitude, low, z, norms, excess)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, magnitude, low, z, norms, excess = ctx.saved_tensors
        linear, rows = ctx.linear, x.reshape(-1, x.shape[-1])
        d_magnitude = (grad * z).sum(0, dtype=norms.dtype).div_(norms).to(magnitude.dtype)
        scaled = torch.addcmul(grad, grad, excess)  # g dy
        low_grad = (scaled @ b.to(grad.dtype)).mul_(linear.scaling)  # [N, rank]
        d_a = (low_grad.T @ linear.dropped(rows)).to(a.dtype)
        d_b = (scaled.T @ low).mul_(linear.scaling).to(b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            weight = dense(linear.weight, linear.state, grad.dtype)
            if linear.dropout is None:
                dx = (scaled @ weight).addmm_(low_grad, a.to(grad.dtype))
            else:
                inner = ((grad * excess) @ weight).addmm_(low_grad, a.to(grad.dtype))
                dx = (grad @ weight).add_(linear.dropped(inner))
            dx = dx.view(x.shape)
        return dx, None, d_a, d_b, d_magnitude, None, None
