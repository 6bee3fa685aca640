"""The experts of a mixture as one autograd function: y_t = sum over the chosen experts e of w_te E_e(x_t).

An expert E is a feed-forward block, W_down act(W_wide x), with gate and up in one matrix W_wide where it is gated. The
pairs (token, chosen expert) are sorted by expert once, so each expert that has tokens reads consecutive pairs, and its
matrices are dequantized once a pass. With g = dL/dy_t, wide = W_wide x and p = act(wide):

    dL/dp = w W_down^T g        dL/dw = p . W_down^T g       dL/dx = W_wide^T (dL/dp act'(wide))

so the backward needs no output of W_down, and the gradient of the routing weight w comes with the gradient of p.
Low-rank updates of an expert's matrices add to all products with them, as in `qlora.ops.products`.

The forward keeps its input, the choices and W_wide's output, or computes the last again in the backward. The memory
that a pass takes depends on the number of tokens and of choices only, not on how the router spreads them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from qlora.ops.expert_product import ExpertProduct, Projection, stacked, unstacked
from qlora.ops.mlp import Forward
from qlora.ops.products import Update
from qlora.ops.sorted_pairs import Piece, SortedPairs
from qlora.quantization.nf4 import autocast


class Gate(Protocol):
    """The function between the two products of an expert."""

    def product(self, wide: Tensor, out: Tensor) -> None:
        """Write the input of W_down [S, I] to `out`, from W_wide's output [S, wide]."""
        ...

    def gradient(self, wide: Tensor, d_product: Tensor, out: Tensor) -> None:
        """Write dL/dwide [S, wide] to `out`, from dL/dproduct [S, I], which it may overwrite."""
        ...


class Experts(NamedTuple):
    """Constants of the experts of a layer."""

    number: int
    """number of experts"""
    wide: Projection
    down: Projection
    gate: Gate
    group: int = 1
    """number of experts whose products are computed at once"""


def mixture(
    hidden: Tensor,
    choices: Tensor,
    weights: Tensor,
    experts: Experts,
    updates: tuple[Update, Update],
    mode: Forward = Forward.SAVE,
) -> Tensor:
    """Apply the chosen experts to each token and add their outputs, weighted.

    Args:
        hidden: tokens [N, H].
        choices: numbers of the experts [N, K]. A number from `experts.number` on chooses none.
        weights: factors of the outputs [N, K].
        experts: constants of the experts.
        updates: A and B for W_wide and for W_down, in PEFT's layout (see `expert_product`).
        mode: what is kept for the backward, and whether the output is needed. Without gradients always INFERENCE.

    Returns:
        [N, H] in the dtype of `hidden`; uninitialised memory in RECOMPUTE mode.
    """
    flat = [tensor for update in updates for tensor in update]
    if not torch.is_grad_enabled():  # read here: always disabled inside the function
        mode = Forward.INFERENCE
    y: Tensor = _Mixture.apply(autocast(hidden), choices, weights, experts, mode, *flat)
    return y


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        choices: Tensor,
        weights: Tensor,
        experts: Experts,
        mode: Forward,
        *flat: Tensor | None,
    ) -> Tensor:
        ctx.experts, kept = experts, None
        if mode is Forward.RECOMPUTE:
            y = torch.empty_like(hidden)
        else:
            run = _Pass(hidden, choices, weights, experts, flat)
            if mode is Forward.SAVE:
                kept = hidden.new_empty(run.pairs.padded, experts.wide.out_features)
            y = run.output(kept)
        if mode is not Forward.INFERENCE:
            ctx.save_for_backward(hidden, choices, weights, kept, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, choices, weights, kept, *flat = ctx.saved_tensors
        run = _Pass(hidden, choices, weights, ctx.experts, flat)
        d_hidden, d_weights = run.gradients(grad, kept, wants_input=ctx.needs_input_grad[0])
        d_wide, d_down = unstacked(run.wide.d_update, *flat[:2]), unstacked(run.down.d_update, *flat[2:])
        return d_hidden, None, d_weights, None, None, *d_wide, *d_down


class _Pass:
    """One pass over the experts, piece by piece; its buffers have room for the rows of one piece."""

    def __init__(
        self,
        hidden: Tensor,
        choices: Tensor,
        weights: Tensor,
        experts: Experts,
        flat: Sequence[Tensor | None],
    ) -> None:
        self.hidden, self.weights, self.gate = hidden, weights, experts.gate
        self.pairs = pairs = SortedPairs(choices, experts.number, experts.group, hidden.dtype)
        factors = weights.reshape(-1, 1)[pairs.order].to(_sum_dtype(hidden.dtype))
        self.factors = pad(factors, (0, 0, 0, pairs.padded - pairs.count))  # [S + padding, 1]
        a_wide, b_wide, a_down, b_down = flat
        wide = stacked(a_wide, b_wide, experts.wide.experts, hidden.dtype)
        down = stacked(a_down, b_down, experts.down.experts, hidden.dtype)
        self.wide = ExpertProduct(experts.wide, wide, pairs, hidden, by_pair=False)
        self.down = ExpertProduct(experts.down, down, pairs, hidden, by_pair=True)

    def output(self, kept: Tensor | None) -> Tensor:
        """Return the output [N, H]. Write W_wide's output to `kept` [S + padding, wide], if given."""
        token, wide, inner = self._widths
        x_room, y_room, p_room = (self._room(width) for width in (token, token, inner))
        w_room = self._room(wide) if kept is None else None
        outputs = self._row_for_each_pair()
        for piece in self._pieces():
            x = self._gather(self.hidden, piece, x_room)
            w, p, y = _wide(piece, kept, w_room), p_room[: piece.rows], y_room[: piece.rows]
            self.wide.apply(x, piece, w)
            self.gate.product(w, p)
            self.down.apply(p, piece, y)
            self._scatter(y.mul_(self.factors[piece.padded]), piece, outputs)
        return self._sum_of_choices(outputs)

    def gradients(
        self, grad: Tensor, kept: Tensor | None, *, wants_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return dL/dhidden [N, H] and dL/dweights [N, K] from `grad`, dL/dy [N, H]; compute those of A and B."""
        token, wide, inner = self._widths
        x_room, d_room, p_room, d_p_room, d_w_room = map(self._room, (token, token, inner, inner, wide))
        w_room = self._room(wide) if kept is None else None
        d_inputs = self._row_for_each_pair() if wants_input else None
        d_factors = torch.zeros(self.pairs.count, dtype=_sum_dtype(grad.dtype), device=grad.device)
        self.wide.prepare_gradients()
        self.down.prepare_gradients()
        for piece in self._pieces():
            x, d_y = self._gather(self.hidden, piece, x_room), self._gather(grad, piece, d_room)
            w, p, factors = _wide(piece, kept, w_room), p_room[: piece.rows], self.factors[piece.padded]
            d_w, d_p = d_w_room[: piece.rows], d_p_room[: piece.rows]
            if kept is None:
                self.wide.apply(x, piece, w)
            self.gate.product(w, p)
            self.down.gradients(p, d_y, piece, d_p, factors)
            d_factors[piece.pairs] = self.down.along(p, d_p, d_y, piece, d_factors.dtype)[: piece.size]
            self.gate.gradient(w, d_p.mul_(factors), d_w)
            d_x = d_y if d_inputs is not None else None  # dL/dy is not read again
            self.wide.gradients(x, d_w, piece, d_x)
            if d_x is not None and d_inputs is not None:
                self._scatter(d_x, piece, d_inputs)
        d_weights = torch.empty_like(d_factors).index_copy_(0, self.pairs.order, d_factors)
        d_hidden = None if d_inputs is None else self._sum_of_choices(d_inputs)
        return d_hidden, d_weights.view(self.weights.shape).to(self.weights.dtype)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Width of a token, of W_wide's output, and of the input of W_down."""
        return self.hidden.shape[1], self.wide.projection.out_features, self.down.projection.in_features

    def _pieces(self) -> Iterator[Piece]:
        """Yield the pieces, with the matrices of their experts dequantized."""
        for group in self.pairs:
            self.wide.enter(group.experts)
            self.down.enter(group.experts)
            yield from group.pieces

    def _room(self, width: int) -> Tensor:
        """Make a buffer for the rows of a piece."""
        return self.hidden.new_empty(self.pairs.room, width)

    def _gather(self, source: Tensor, piece: Piece, room: Tensor) -> Tensor:
        """Copy the tokens of a piece from `source` [N, H] to `room`; return them, padded with zeros, [n, H]."""
        torch.index_select(source, 0, self.pairs.tokens[piece.pairs], out=room[: piece.size])
        room[piece.size : piece.rows].zero_()
        return room[: piece.rows]

    def _row_for_each_pair(self) -> Tensor:
        """Make a tensor [S, H] for rows in the order of the choices; zero for a pair without an expert."""
        made = self.hidden.new_empty(self.pairs.count, self.hidden.shape[1])
        return made.index_fill_(0, self.pairs.order[self.pairs.chosen :], 0)

    def _scatter(self, rows: Tensor, piece: Piece, to: Tensor) -> None:
        """Copy the rows of a piece to their places in `to`, see `_row_for_each_pair`."""
        to.index_copy_(0, self.pairs.order[piece.pairs], rows[: piece.size])

    def _sum_of_choices(self, rows: Tensor) -> Tensor:
        """Add the rows [S, H] of each token, in the order of its choices; torch adds 16-bit numbers in fp32."""
        return rows.view(*self.weights.shape, rows.shape[1]).sum(1)


def _wide(piece: Piece, kept: Tensor | None, room: Tensor | None) -> Tensor:
    """Return the rows of W_wide's output for a piece: kept ones, or a part of the buffer."""
    if kept is not None:
        return kept[piece.padded]  # the next piece overwrites the padding
    assert room is not None
    return room[: piece.rows]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
