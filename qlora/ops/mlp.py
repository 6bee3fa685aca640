"""The gated feed-forward block of Llama as one autograd function: h + W_down (silu(W_gate n) * W_up n), n = norm(h).

Shazeer 2020, "GLU Variants Improve Transformer". Autograd would keep seven tensors as wide as the block; of
these gate and up suffice. The normalised input, silu(gate) and the product are rebuilt from them. Or nothing but h is
kept, and gate and up are computed again: two of the three products, for W_down's is no part of any gradient.
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
    hidden: Tensor,
    norm: Norm,
    linears: Sequence[Linear],
    updates: Sequence[Update],
    *,
    keep: bool = True,
    output: bool = True,
) -> Tensor:
    """hidden [..., H] -> [..., H], the residual stream after the block; `linears` are gate, up and down.

    keep: gate and up for the backward; without, it computes them again. Without `output` nothing is computed, and
    what comes back is memory without meaning: for a recompute of what lies before.
    """
    for linear in linears:
        linear.assert_frozen()
    grad = torch.is_grad_enabled()  # always False inside the function
    flat = [tensor for update in updates for tensor in update]
    y: Tensor = _GatedMLP.apply(hidden, norm, linears, grad, keep and grad, output, *flat)
    return y


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: Norm,
        linears: Sequence[Linear],
        grad: bool,
        keep: bool,
        output: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        ctx.norm, ctx.linears = norm, linears
        if not output:
            ctx.save_for_backward(hidden, *flat)
            return torch.empty_like(hidden)
        rows, updates = hidden.reshape(-1, hidden.shape[-1]), updates_of(flat)
        gate, up, lows = _widen(rows, norm, linears, updates, fold=grad)
        product = silu_product(gate, up)
        lows += to_ranks(product, linears[2:], updates[2:])
        ctx.save_for_backward(hidden, *flat, *([gate, up, *lows] if keep else []))
        del gate, up
        (y,) = project(product, linears[2:], updates[2:], lows[2:], fold=grad)
        return y.add_(rows).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *saved = ctx.saved_tensors
        updates, kept = updates_of(saved[:6]), saved[6:]
        rows, grad_rows = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if kept:
            gate, up, *lows = kept
            product = silu_product(gate, up)
        else:
            gate, up, lows = _widen(rows, ctx.norm, ctx.linears, updates)
            product = silu_product(gate, up)
            lows += to_ranks(product, ctx.linears[2:], updates[2:])
        d_product, d_down = gradients(product, [grad_rows], ctx.linears[2:], updates[2:], lows[2:])
        assert d_product is not None
        d_gate, d_up = d_product, product  # in their places
        silu_gradients(gate, up, d_gate, d_up)
        del saved, kept, gate, up, product, d_product
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
        return (
            d_hidden,
            None,
            None,
            None,
            None,
            None,
            *(tensor for pair in [*d_wide, *d_down] for tensor in pair),
        )


def _widen(
    rows: Tensor, norm: Norm, linears: Sequence[Linear], updates: Sequence[Update], *, fold: bool = True
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """rows [N, H] -> gate and up [N, I], and what the A of each made of the normalised rows."""
    normal = normalize(rows, *norm)
    lows = to_ranks(normal, linears[:2], updates[:2])
    gate, up = project(normal, linears[:2], updates[:2], lows, fold=fold)
    return gate, up, lows
