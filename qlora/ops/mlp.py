"""The gated feed-forward block as one autograd function: h + post(W_down (act(W_gate n) * W_up n)), n = norm(h).

Shazeer 2020, "GLU Variants Improve Transformer"; either norm may be missing. Autograd would keep seven tensors as wide
as the block; of these gate and up suffice. The normalised input, act(gate) and the product are rebuilt from them. Or
nothing but h is kept, and gate and up are computed again: two of the three products, for W_down's is no part of any
gradient unless a norm follows it. Then no more of the wide tensors needs to be in memory than those of some tokens:
many go through one piece after the other.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.kernels import SILU, Activation
from qlora.ops.dropout import PIECE
from qlora.ops.products import Linear, Update, gradients, project, to_ranks, unpack
from qlora.ops.rms_norm import Norm, input_gradient, normalized


class GatedMLP(NamedTuple):
    """The constants of a gated block."""

    linears: Sequence[Linear]
    """gate, up and down"""
    norm: Norm | None = None
    """of its input"""
    post_norm: Norm | None = None
    """of its output, before the residual is added"""
    activation: Activation = SILU


class Forward(Enum):
    """What a forward pass is for: what it computes, and what it keeps."""

    INFERENCE = "the output; no backward will follow"
    KEEPING = "the output; gate and up are kept for the backward"
    SPARING = "the output; the backward computes gate and up again"
    RECOMPUTE = "no output, for nobody reads it a second time; the backward computes gate and up again"


def gated_mlp(
    hidden: Tensor, block: GatedMLP, updates: Sequence[Update], mode: Forward = Forward.KEEPING
) -> Tensor:
    """hidden [..., H] -> [..., H], the residual stream after the block; without a gradient always for inference.

    Sparing, PIECE tokens at a time. A recompute, of what lies before, gets memory without meaning.
    """
    for linear in block.linears:
        linear.assert_frozen()
    if not torch.is_grad_enabled():  # always so inside the function
        mode = Forward.INFERENCE
    flat = [tensor for update in updates for tensor in update]
    y: Tensor = _GatedMLP.apply(hidden, block, mode, *flat)
    return y


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: GatedMLP, mode: Forward, *flat: Tensor | None) -> Tensor:
        ctx.block = block
        rows, (updates, _) = hidden.reshape(-1, hidden.shape[-1]), unpack(flat, block.linears)
        kept: list[Tensor | None] = []
        if mode is Forward.RECOMPUTE:
            y = torch.empty_like(rows)
        elif mode is Forward.KEEPING or len(rows) <= PIECE:
            y, kept = _block(rows, block, updates, mode)
        else:
            y = torch.empty_like(rows)
            for here, part, into in _pieces(block, rows, y):
                into.copy_(_block(part, here, updates, mode)[0])
        ctx.save_for_backward(hidden, *flat, *kept)
        return y.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *saved = ctx.saved_tensors
        updates, kept = unpack(saved, ctx.block.linears)
        del saved
        rows, grad_rows = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        wants_input = ctx.needs_input_grad[0]
        if kept or len(rows) <= PIECE:
            d_rows, d_updates = _gradients(rows, grad_rows, ctx.block, updates, kept, wants_input=wants_input)
        else:
            d_rows, d_updates = torch.empty_like(rows) if wants_input else None, []
            for here, part, grad_part, into in _pieces(ctx.block, rows, grad_rows, d_rows):
                d_part, more = _gradients(part, grad_part, here, updates, [], wants_input=wants_input)
                if into is not None and d_part is not None:
                    into.copy_(d_part)
                d_updates = [
                    tensor if before is None or tensor is None else before.add_(tensor)
                    for before, tensor in zip_longest(d_updates, more)
                ]
                del d_part, more  # not while the next piece is worked on
        d_hidden = None if d_rows is None else d_rows.view(hidden.shape)
        return d_hidden, None, None, *d_updates


def _pieces(block: GatedMLP, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """For every piece of the tokens: the block, whose linears drop their part, and its rows of each of the tensors."""
    tokens = next(len(tensor) for tensor in tensors if tensor is not None)
    for number, start in enumerate(range(0, tokens, PIECE)):
        here = [
            linear
            if linear.dropout is None
            else linear._replace(dropout=linear.dropout.of_piece(number, tokens))
            for linear in block.linears
        ]
        parts = (None if tensor is None else tensor[start : start + PIECE] for tensor in tensors)
        yield block._replace(linears=here), *parts


def _block(
    rows: Tensor, block: GatedMLP, updates: Sequence[Update], mode: Forward
) -> tuple[Tensor, list[Tensor | None]]:
    """rows [N, H] -> [N, H], and what is kept for the gradients: gate, up, what each A made, W_down's if normalised."""
    fold = mode is not Forward.INFERENCE
    gate, up, product, lows = _widen(rows, block, updates, fold=fold)
    kept = [gate, up, *lows] if mode is Forward.KEEPING else []
    del gate, up
    y = _narrow(product, block, updates, lows, fold=fold)
    del product
    if block.post_norm is not None:
        if kept:
            kept.append(y)
        y = normalized(y, block.post_norm)
    return y.add_(rows), kept


def _gradients(
    rows: Tensor,
    grad_rows: Tensor,
    block: GatedMLP,
    updates: Sequence[Update],
    kept: list[Any],
    *,
    wants_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dL/drows [N, H] from dL/dy [N, H], and those of A, B, A, B and so on. `kept` is emptied, or made if empty."""
    linears, d_y = block.linears, grad_rows
    if kept:
        gate, up, *lows = kept
        kept.clear()
        product = block.activation.product(gate, up)
    else:
        gate, up, product, lows = _widen(rows, block, updates)
        if block.post_norm is not None:
            lows.append(_narrow(product, block, updates, lows))
    if block.post_norm is not None:
        d_y = grad_rows.clone(memory_format=torch.contiguous_format)
        input_gradient(d_y, lows.pop(), block.post_norm)
    d_product, d_down = gradients(product, [d_y], linears[2:], updates[2:], lows[2:])
    del d_y
    assert d_product is not None
    d_gate, d_up = d_product, product  # in their places
    block.activation.gradients(gate, up, d_gate, d_up)
    del gate, up, product, d_product
    d_rows, d_wide = gradients(
        normalized(rows, block.norm),
        [d_gate, d_up],
        linears[:2],
        updates[:2],
        lows[:2],
        wants_input=wants_input,
    )
    del d_gate, d_up
    if d_rows is not None:
        input_gradient(d_rows, rows, block.norm, residual=grad_rows)
    return d_rows, [tensor for pair in [*d_wide, *d_down] for tensor in pair]


def _widen(
    rows: Tensor, block: GatedMLP, updates: Sequence[Update], *, fold: bool = True
) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """rows [N, H] -> gate, up and their product [N, I], and what each A made of its input [N, rank]."""
    linears, normal = block.linears, normalized(rows, block.norm)
    lows = to_ranks(normal, linears[:2], updates[:2])
    gate, up = project(normal, linears[:2], updates[:2], lows, fold=fold)
    del normal
    product = block.activation.product(gate, up)
    return gate, up, product, lows + to_ranks(product, linears[2:], updates[2:])


def _narrow(
    product: Tensor,
    block: GatedMLP,
    updates: Sequence[Update],
    lows: Sequence[Tensor | None],
    *,
    fold: bool = True,
) -> Tensor:
    """The product of gate and up [N, I] -> what W_down makes of it [N, H]."""
    return project(product, block.linears[2:], updates[2:], lows[2:], fold=fold)[0]
