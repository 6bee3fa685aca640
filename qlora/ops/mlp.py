"""The gated feed-forward block of Llama as one autograd function: h + W_down (silu(W_gate n) * W_up n), n = norm(h).

Shazeer 2020, "GLU Variants Improve Transformer". Autograd would keep seven tensors as wide as the block; of
these gate and up suffice. The normalised input, silu(gate) and the product are rebuilt from them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.kernels import normalize, normalize_gradient, silu_gradients, silu_product
from qlora.ops.products import Linear, Update, gradients, project, to_ranks, updates_of
from qlora.ops.rms_norm import Norm


def gated_mlp(
    hidden: Tensor, norm: Norm, linears: Sequence[Linear], updates: Sequence[Update], *, output: bool = True
) -> Tensor:
    """hidden [..., H] -> [..., H], the residual stream after the block; `linears` are gate, up and down.

    Without `output` the last product is left out, and what comes back is memory without meaning: for a
    recompute, which only wants what the backward keeps.
    """
    for linear in linears:
        linear.assert_frozen()
    grad = torch.is_grad_enabled()  # always False inside the function
    flat = [tensor for update in updates for tensor in update]
    y: Tensor = _GatedMLP.apply(hidden, norm, linears, grad, output, *flat)
    return y


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: Norm,
        linears: Sequence[Linear],
        grad: bool,
        output: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        updates = updates_of(flat)
        normal = normalize(rows, *norm)
        lows = to_ranks(normal, linears[:2], updates[:2])
        gate, up = project(normal, linears[:2], updates[:2], lows, fold=grad)
        del normal
        product = silu_product(gate, up)
        lows += to_ranks(product, linears[2:], updates[2:])
        ctx.norm, ctx.linears = norm, linears
        ctx.save_for_backward(hidden, gate, up, *flat, *lows)
        if not output:
            return torch.empty_like(hidden)
        (y,) = project(product, linears[2:], updates[2:], lows[2:], fold=grad)
        return y.add_(rows).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate, up, *saved = ctx.saved_tensors
        updates, lows = updates_of(saved[:6]), saved[6:]
        rows, grad_rows = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        product = silu_product(gate, up)
        d_product, d_down = gradients(product, [grad_rows], ctx.linears[2:], updates[2:], lows[2:])
        assert d_product is not None
        d_gate, d_up = d_product, product  # in their places
        silu_gradients(gate, up, d_gate, d_up)
        del product, d_product
        d_hidden, d_wide = gradients(
            normalize(rows, *ctx.norm),
            [d_gate, d_up],
            ctx.linears[:2],
            updates[:2],
            lows[:2],
            wants_input=ctx.needs_input_grad[0],
        )
        del d_gate, d_up
        if d_hidden is not None:
            weight, eps = ctx.norm
            normalize_gradient(d_hidden, rows, weight, eps, residual=grad_rows)
            d_hidden = d_hidden.view(hidden.shape)
        return d_hidden, None, None, None, None, *(tensor for pair in [*d_wide, *d_down] for tensor in pair)
