"""The gated feed-forward block of Llama as one autograd function: h + W_down (silu(W_gate n) * W_up n), n = norm(h).

Shazeer 2020, "GLU Variants Improve Transformer". Autograd would keep seven tensors as wide as the block; of
these gate and up suffice. The normalised input, silu(gate) and the product are rebuilt from them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.ops.products import Kept, Linear, Update, gradients, pairs, project, to_ranks
from qlora.ops.rms_norm import Norm, normalize, normalize_gradient


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
        updates = pairs(Update, flat)
        normal = normalize(rows, norm)
        kept = to_ranks(normal, linears[:2], updates[:2])
        gate, up = project(normal, linears[:2], updates[:2], kept, fold=grad)
        del normal
        product = F.silu(gate).mul_(up)
        kept += to_ranks(product, linears[2:], updates[2:])
        ctx.norm, ctx.linears = norm, linears
        ctx.save_for_backward(hidden, gate, up, *flat, *(tensor for one in kept for tensor in one))
        if not output:
            return torch.empty_like(hidden)
        (y,) = project(product, linears[2:], updates[2:], kept[2:], fold=grad)
        return y.add_(rows).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate, up, *saved = ctx.saved_tensors
        updates, kept = pairs(Update, saved[:6]), pairs(Kept, saved[6:])
        rows, grad_rows = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        silu = F.silu(gate)
        d_product, d_down = gradients(silu * up, [grad_rows], ctx.linears[2:], updates[2:], kept[2:])
        assert d_product is not None
        d_up = silu.mul_(d_product)
        d_gate = torch.ops.aten.silu_backward(d_product.mul_(up), gate)
        del d_product
        wanted = ctx.needs_input_grad[0]
        d_normal, d_wide = gradients(
            normalize(rows, ctx.norm),
            [d_gate, d_up],
            ctx.linears[:2],
            updates[:2],
            kept[:2],
            wants_input=wanted,
        )
        del d_gate, d_up, silu
        d_hidden = None
        if d_normal is not None:
            d_hidden = normalize_gradient(d_normal, rows, ctx.norm).add_(grad_rows).view(hidden.shape)
        return d_hidden, None, None, None, None, *(tensor for pair in [*d_wide, *d_down] for tensor in pair)
