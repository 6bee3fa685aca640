"""The gated feed-forward block as one autograd function: h + s post(W_down (act(W_gate n) * W_up n)), n = norm(h).

See Shazeer 2020, "GLU Variants Improve Transformer". Either norm can be missing. Autograd would keep seven tensors of
the block's width. This function keeps only gate and up, and recomputes the normalised input, act(gate) and the product
from them. Or it keeps only h and recomputes gate and up too. This takes two of the three matrix products, because no
gradient needs the output of W_down unless a norm follows. Long inputs are then processed piece by piece, so that the
wide tensors of one piece at a time are in memory.
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
    """Constants of a gated feed-forward block."""

    linears: Sequence[Linear]
    """gate, up and down; gate and up can be one linear with two outputs"""
    norm: Norm | None = None
    """norm of the input"""
    post_norm: Norm | None = None
    """norm of the output, before the residual is added"""
    activation: Activation = SILU
    scale: float = 1.0
    """factor of the output, before the residual is added"""


class Forward(Enum):
    """Mode of a forward pass: its output, and the tensors that it keeps."""

    INFERENCE = "the output; no backward follows"
    SAVE = "the output; gate and up are kept for the backward"
    RECOMPUTE_WIDE = "the output; the backward computes gate and up again"
    RECOMPUTE = "no output, because it is not read again; the backward computes gate and up again"


def gated_mlp(
    hidden: Tensor, block: GatedMLP, updates: Sequence[Update], mode: Forward = Forward.SAVE
) -> Tensor:
    """Apply the block to the residual stream `hidden` [..., H]; return the residual stream after the block.

    Without gradients the mode is always INFERENCE. Except in SAVE mode, PIECE tokens are processed at a time. In
    RECOMPUTE mode, which serves to recompute the layer before this block, the output is uninitialised memory.
    """
    for linear in block.linears:
        linear.assert_frozen()
    if not torch.is_grad_enabled():  # checked here: always disabled inside the function
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
        elif mode is Forward.SAVE or len(rows) <= PIECE:
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
                del d_part, more  # free them before the next piece
        d_hidden = None if d_rows is None else d_rows.view(hidden.shape)
        return d_hidden, None, None, *d_updates


def _pieces(block: GatedMLP, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield, per piece of the tokens, the block with the dropout masks of the piece, and the piece of each tensor."""
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
    """Return the output [N, H] and the tensors kept: gate, up, products with A, output of W_down if normalised."""
    fold = mode is not Forward.INFERENCE
    gate, up, product, lows = _widen(rows, block, updates, fold=fold)
    kept = [gate, up, *lows] if mode is Forward.SAVE else []
    del gate, up
    y = _narrow(product, block, updates, lows, fold=fold)
    del product
    if block.post_norm is not None:
        if kept:
            kept.append(y)
        y = normalized(y, block.post_norm)
    if block.scale != 1:
        y.mul_(block.scale)
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
    """Return dL/drows [N, H] and the gradients of A, B, A, B, ...; `grad_rows` is dL/dy [N, H].

    Empties `kept` to free its tensors early; if `kept` is empty already, recomputes them.
    """
    linears, d_y = block.linears, grad_rows if block.scale == 1 else grad_rows * block.scale
    if kept:
        gate, up, *lows = kept
        kept.clear()
        block.activation.product(gate, up, product := torch.empty_like(gate))
    else:
        gate, up, product, lows = _widen(rows, block, updates)
        if block.post_norm is not None:
            lows.append(_narrow(product, block, updates, lows))
    if block.post_norm is not None:
        d_y = d_y.clone(memory_format=torch.contiguous_format)
        input_gradient(d_y, lows.pop(), block.post_norm)
    d_product, d_down = gradients(product, [d_y], linears[-1:], updates[-1:], lows[-1:])
    del d_y
    assert d_product is not None
    d_gate, d_up = d_product, product  # reuse their memory
    block.activation.gradients(gate, up, d_gate, d_up)
    del gate, up, product, d_product
    d_rows, d_wide = gradients(
        normalized(rows, block.norm),
        [d_gate, d_up],
        linears[:-1],
        updates[:-1],
        lows[:-1],
        wants_input=wants_input,
    )
    del d_gate, d_up
    if d_rows is not None:
        input_gradient(d_rows, rows, block.norm, residual=grad_rows)
    return d_rows, [tensor for pair in [*d_wide, *d_down] for tensor in pair]


def _widen(
    rows: Tensor, block: GatedMLP, updates: Sequence[Update], *, fold: bool = True
) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """Return gate, up and activation(gate) * up, each [N, I], and A x [N, rank] of each LoRA update, or None.

    fold: allow adding an update to the dequantized weight, as in `products.project`.
    """
    linears, normal = block.linears, normalized(rows, block.norm)
    lows = to_ranks(normal, linears[:-1], updates[:-1])
    gate, up = project(normal, linears[:-1], updates[:-1], lows, fold=fold)
    del normal
    block.activation.product(gate, up, product := torch.empty_like(gate))
    return gate, up, product, lows + to_ranks(product, linears[-1:], updates[-1:])


def _narrow(
    product: Tensor,
    block: GatedMLP,
    updates: Sequence[Update],
    lows: Sequence[Tensor | None],
    *,
    fold: bool = True,
) -> Tensor:
    """Apply W_down with its update to the product of gate and up [N, I]; return [N, H]."""
    return project(product, block.linears[-1:], updates[-1:], lows[-1:], fold=fold)[0]
