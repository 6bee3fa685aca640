"""The gated feed-forward block of Llama as one autograd function: h + W_down (silu(W_gate n) * W_up n), n = norm(h).

Shazeer 2020, "GLU Variants Improve Transformer". Autograd would keep seven tensors as wide as the block; of
these gate and up suffice. The normalised input, silu(gate) and the product are rebuilt from them. Or nothing but h is
kept, and gate and up are computed again: two of the three products, for W_down's is no part of any gradient. Then no
more of the wide tensors needs to be in memory than those of some tokens: many go through one piece after the other.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.kernels import normalize, normalize_gradient, silu_gradients, silu_product
from qlora.ops.dropout import PIECE
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

    keep: gate and up for the backward; without, it computes them again, PIECE tokens at a time. Without `output`
    nothing is computed, and what comes back is memory without meaning: for a recompute of what lies before.
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
        rows, updates = hidden.reshape(-1, hidden.shape[-1]), updates_of(flat)
        kept: list[Tensor | None] = []
        if output and (keep or len(rows) <= PIECE):
            y, kept = _block(rows, norm, linears, updates, fold=grad, keep=keep)
        else:
            y = torch.empty_like(rows)
            for here, part, into in _pieces(linears, rows, y) if output else ():
                into.copy_(_block(part, norm, here, updates, fold=grad)[0])
        ctx.save_for_backward(hidden, *flat, *kept)
        return y.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *saved = ctx.saved_tensors
        updates, kept = updates_of(saved[:6]), saved[6:]
        del saved
        rows, grad_rows = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        wants_input = ctx.needs_input_grad[0]
        if kept or len(rows) <= PIECE:
            d_rows, d_updates = _gradients(
                rows, grad_rows, ctx.norm, ctx.linears, updates, kept, wants_input=wants_input
            )
        else:
            d_rows, d_updates = torch.empty_like(rows) if wants_input else None, []
            for here, part, grad_part, into in _pieces(ctx.linears, rows, grad_rows, d_rows):
                d_part, more = _gradients(
                    part, grad_part, ctx.norm, here, updates, [], wants_input=wants_input
                )
                if into is not None and d_part is not None:
                    into.copy_(d_part)
                d_updates = [
                    tensor if before is None or tensor is None else before.add_(tensor)
                    for before, tensor in zip_longest(d_updates, more)
                ]
                del d_part, more  # not while the next piece is worked on
        d_hidden = None if d_rows is None else d_rows.view(hidden.shape)
        return (d_hidden, None, None, None, None, None, *d_updates)


def _pieces(linears: Sequence[Linear], *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """For every piece of the tokens: the linears, which drop their part, and its rows of each of the tensors."""
    tokens = next(len(tensor) for tensor in tensors if tensor is not None)
    for number, start in enumerate(range(0, tokens, PIECE)):
        here = [
            linear if linear.dropout is None else linear._replace(dropout=linear.dropout.of_piece(number))
            for linear in linears
        ]
        yield here, *(None if tensor is None else tensor[start : start + PIECE] for tensor in tensors)


def _block(
    rows: Tensor,
    norm: Norm,
    linears: Sequence[Linear],
    updates: Sequence[Update],
    *,
    fold: bool,
    keep: bool = False,
) -> tuple[Tensor, list[Tensor | None]]:
    """rows [N, H] -> [N, H], and what is kept for the gradients: gate, up and what each A made."""
    gate, up, lows = _widen(rows, norm, linears, updates, fold=fold)
    product = silu_product(gate, up)
    lows += to_ranks(product, linears[2:], updates[2:])
    kept = [gate, up, *lows] if keep else []
    del gate, up
    (y,) = project(product, linears[2:], updates[2:], lows[2:], fold=fold)
    return y.add_(rows), kept


def _gradients(
    rows: Tensor,
    grad_rows: Tensor,
    norm: Norm,
    linears: Sequence[Linear],
    updates: Sequence[Update],
    kept: list[Any],
    *,
    wants_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dL/drows [N, H] from dL/dy [N, H], and those of A, B, A, B and so on. `kept` is emptied, or made if empty."""
    if kept:
        gate, up, *lows = kept
        kept.clear()
        product = silu_product(gate, up)
    else:
        gate, up, lows = _widen(rows, norm, linears, updates)
        product = silu_product(gate, up)
        lows += to_ranks(product, linears[2:], updates[2:])
    d_product, d_down = gradients(product, [grad_rows], linears[2:], updates[2:], lows[2:])
    assert d_product is not None
    d_gate, d_up = d_product, product  # in their places
    silu_gradients(gate, up, d_gate, d_up)
    del gate, up, product, d_product
    d_rows, d_wide = gradients(
        normalize(rows, *norm),
        [d_gate, d_up],
        linears[:2],
        updates[:2],
        lows[:2],
        wants_input=wants_input,
    )
    del d_gate, d_up
    if d_rows is not None:
        weight, eps = norm
        normalize_gradient(d_rows, rows, weight, eps, residual=grad_rows)
    return d_rows, [tensor for pair in [*d_wide, *d_down] for tensor in pair]


def _widen(
    rows: Tensor, norm: Norm, linears: Sequence[Linear], updates: Sequence[Update], *, fold: bool = True
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """rows [N, H] -> gate and up [N, I], and what the A of each made of the normalised rows [N, rank]."""
    normal = normalize(rows, *norm)
    lows = to_ranks(normal, linears[:2], updates[:2])
    gate, up = project(normal, linears[:2], updates[:2], lows, fold=fold)
    return gate, up, lows
