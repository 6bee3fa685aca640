"""The experts of a mixture as one autograd function: y_t = sum over the chosen experts e of w_te E_e(x_t).

An expert E is a feed-forward block, W_down act(W_wide x), with gate and up in one matrix W_wide where it is gated. The
pairs (token, chosen expert) are sorted by expert once, so each expert that has tokens reads consecutive pairs, and its
matrices are dequantized once a pass. With g = dL/dy_t and p = act(wide):

    dL/dp = w W_down^T g        dL/dw = p . W_down^T g       dL/dx = W_wide^T (dL/dp act'(wide))

so the backward needs no output of W_down, and the gradient of the routing weight w comes with the gradient of p.
Low-rank updates of an expert's matrices add to all products with them, as in `qlora.ops.products`.

The forward keeps its input, the choices and W_wide's output. The memory that a pass takes depends on the number of
tokens and of choices only, not on how the router spreads them: buffers for one expert have room for all tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops.dropout import Dropout
from qlora.quantization.nf4 import autocast
from qlora.runtime.fake import is_fake


class Gate(Protocol):
    """The function between the two products of an expert."""

    def product(self, wide: Tensor) -> Tensor:
        """Map W_wide's output [S, wide] to the input of W_down [S, I]."""
        ...

    def gradient(self, wide: Tensor, d_product: Tensor) -> Tensor:
        """Return dL/dwide [S, wide] from dL/dproduct [S, I], which it may overwrite."""
        ...


class Projection(NamedTuple):
    """Constants of one projection of all experts, with a low-rank update."""

    matrix: Callable[[int, torch.dtype], Tensor]
    """called with an expert's number and a dtype: its frozen matrix [out, in]"""
    out_features: int
    bias: Tensor | None = None
    """[E, out]"""
    scaling: float = 1.0
    dropout: Dropout | None = None
    """mask of the input of A"""

    @property
    def factor(self) -> float:
        """Factor of the update: the scaling, times the rescaling of dropout."""
        return self.scaling if self.dropout is None else self.scaling / (1 - self.dropout.rate)


class StackedUpdate(NamedTuple):
    """A [E, rank, in] and B [E, out, rank] of all experts; both None without an update."""

    a: Tensor | None
    b: Tensor | None


class Experts(NamedTuple):
    """Constants of the experts of a layer."""

    number: int
    """number of experts"""
    wide: Projection
    down: Projection
    gate: Gate


def mixture(
    hidden: Tensor,
    choices: Tensor,
    weights: Tensor,
    experts: Experts,
    updates: tuple[StackedUpdate, StackedUpdate],
) -> Tensor:
    """Apply the chosen experts to each token and add their outputs, weighted.

    Args:
        hidden: tokens [N, H].
        choices: numbers of the experts [N, K]. A number from `experts.number` on chooses none.
        weights: factors of the outputs [N, K].
        experts: constants of the experts.
        updates: of W_wide and of W_down.

    Returns:
        [N, H] in the dtype of `hidden`.
    """
    flat = [tensor for update in updates for tensor in update]
    keep = torch.is_grad_enabled()  # read here: always False inside the function
    y: Tensor = _Mixture.apply(autocast(hidden), choices, weights, experts, keep, *flat)
    return y


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        choices: Tensor,
        weights: Tensor,
        experts: Experts,
        keep: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        pairs = _Pairs(choices, experts.number)
        up, down = _unpack(flat, hidden.dtype)
        wide = _widen(hidden, pairs, experts.wide, up)
        y = _narrow(experts.gate.product(wide), weights, pairs, experts.down, down, hidden)
        ctx.experts = experts
        if keep:
            ctx.save_for_backward(hidden, choices, weights, wide, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, choices, weights, wide, *flat = ctx.saved_tensors
        experts, (up, down) = ctx.experts, _unpack(flat, hidden.dtype)
        d_up, d_down = (_zeros_like(update) for update in _unpack(flat))
        pairs = _Pairs(choices, experts.number)
        product = experts.gate.product(wide)
        d_product, d_weights = _narrow_gradients(grad, product, weights, pairs, experts.down, down, d_down)
        del product
        d_wide = experts.gate.gradient(wide, d_product)
        del d_product, wide
        wants_input = ctx.needs_input_grad[0]
        d_hidden = _widen_gradients(d_wide, hidden, pairs, experts.wide, up, d_up, wants_input=wants_input)
        return d_hidden, None, d_weights, None, None, *d_up, *d_down


class _Pairs:
    """The pairs (token, chosen expert), sorted by expert.

    Attributes:
        order: number of each pair in the flat choices [S], in the sorted order.
        tokens: token of each pair [S], in the sorted order.
    """

    def __init__(self, choices: Tensor, experts: int) -> None:
        self.count, self.choices_a_token = choices.numel(), choices.shape[1]
        flat = choices.reshape(-1)
        self.order = flat.argsort(stable=True)
        self.tokens = self.order // self.choices_a_token
        if is_fake(choices):  # no numbers: one expert with all tokens shows all that is allocated
            self._slices = [(0, 0, choices.shape[0])]
            self._chosen = self.count
            return
        ends = torch.bincount(flat, minlength=experts)[:experts].cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self._chosen = ends[-1]
        tokens = len(choices)  # an expert has more pairs only if a token chooses it twice
        self._slices = [
            (expert, first, min(first + tokens, end))
            for expert, (start, end) in enumerate(zip(starts, ends, strict=True))
            for first in range(start, end, tokens)
        ]

    def rows(self, width: int, like: Tensor) -> Tensor:
        """Make a tensor [S, width] to write the rows of all experts to; zero for a pair without an expert."""
        made = like.new_empty(self.count, width)
        made[self._chosen :].zero_()  # such a pair has the highest number, so it is sorted to the end
        return made

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has tokens, with its part of the sorted pairs, or several of at most N pairs."""
        return ((expert, slice(start, end)) for expert, start, end in self._slices)


class _Room:
    """Buffers for the rows of one expert, with room for all tokens [N, H]: in their dtype, and in that of sums."""

    def __init__(self, hidden: Tensor, sums: torch.dtype) -> None:
        self._rows = torch.empty_like(hidden)
        self._wide = self._rows if sums == hidden.dtype else torch.empty_like(hidden, dtype=sums)

    def rows(self, part: slice) -> Tensor:
        """Return the buffer for the pairs `part` [n, H]."""
        return self._rows[: part.stop - part.start]

    def widened(self, part: slice) -> Tensor:
        """Return the rows in the dtype of sums; without a copy if they have it."""
        wide = self._wide[: part.stop - part.start]
        return wide if self._wide is self._rows else wide.copy_(self.rows(part))


class _Masks:
    """Dropout masks of the input of A: of tokens [N, in], or of pairs [S, in]."""

    def __init__(self, dropout: Dropout | None, tokens: int, pairs: _Pairs, like: Tensor, *, by_pair: bool):
        self._mask: Tensor | None = None
        if dropout is None:
            return
        width = like.shape[-1] * (pairs.choices_a_token if by_pair else 1)
        # Rows of the mask are the tokens of the batch, so it does not depend on the micro-batch or on the routing
        mask = dropout.mask(like.new_empty(()).expand(tokens, width))
        self._mask = mask.view(-1, like.shape[-1])
        self._rows = pairs.order if by_pair else pairs.tokens

    def of(self, part: slice) -> Tensor | None:
        """Return the mask of an expert's pairs [n, in]; None without dropout."""
        return None if self._mask is None else self._mask[self._rows[part]]


def _unpack(
    flat: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> tuple[StackedUpdate, StackedUpdate]:
    """Return the updates of W_wide and of W_down, in `dtype` if given."""
    if dtype is not None:  # once for all experts
        flat = [None if tensor is None else tensor.to(dtype) for tensor in flat]
    return StackedUpdate(*flat[:2]), StackedUpdate(*flat[2:])


def _widen(hidden: Tensor, pairs: _Pairs, wide: Projection, update: StackedUpdate) -> Tensor:
    """Return W_wide's output [S, wide] of the sorted pairs; zero for a pair without an expert."""
    output = pairs.rows(wide.out_features, hidden)
    room = torch.empty_like(hidden)
    masks = _Masks(wide.dropout, len(hidden), pairs, hidden, by_pair=False)
    for expert, part in pairs:
        rows = _gathered(hidden, pairs.tokens[part], room)
        torch.mm(rows, wide.matrix(expert, hidden.dtype).T, out=output[part])
        _add_update(output[part], rows, expert, wide, update, masks.of(part))
    return output


def _narrow(
    product: Tensor, weights: Tensor, pairs: _Pairs, down: Projection, update: StackedUpdate, hidden: Tensor
) -> Tensor:
    """Return the weighted sum [N, H] of W_down's outputs, like `hidden`."""
    total = torch.zeros_like(hidden, dtype=_sum_dtype(hidden.dtype))
    room = _Room(hidden, total.dtype)
    factors = weights.reshape(-1, 1)
    masks = _Masks(down.dropout, len(hidden), pairs, product, by_pair=True)
    for expert, part in pairs:
        output = room.rows(part)
        torch.mm(product[part], down.matrix(expert, hidden.dtype).T, out=output)
        _add_update(output, product[part], expert, down, update, masks.of(part))
        # A token has an expert only once as a rule, so no sum depends on the order within an expert
        total.index_add_(0, pairs.tokens[part], room.widened(part).mul_(factors[pairs.order[part]]))
    return total.to(hidden.dtype)


def _narrow_gradients(
    grad: Tensor,
    product: Tensor,
    weights: Tensor,
    pairs: _Pairs,
    down: Projection,
    update: StackedUpdate,
    d_update: StackedUpdate,
) -> tuple[Tensor, Tensor]:
    """Return dL/dproduct [S, I] and dL/dweights [N, K]; `grad` is dL/dy [N, H].

    Overwrites `product`, and writes dL/dA and dL/dB to `d_update`.
    """
    d_product, room = pairs.rows(product.shape[1], product), torch.empty_like(grad)
    factors = weights.reshape(-1, 1)[pairs.order].to(product.dtype)
    d_factors = torch.zeros(pairs.count, dtype=_sum_dtype(product.dtype), device=product.device)
    masks = _Masks(down.dropout, len(grad), pairs, product, by_pair=True)
    for expert, part in pairs:
        mask, rows, d_rows = masks.of(part), product[part], d_product[part]
        d_y = _gathered(grad, pairs.tokens[part], room)
        torch.mm(d_y, down.matrix(expert, grad.dtype), out=d_rows)
        low = _low_gradient(d_y, expert, down, update)
        if low is not None:
            _add_input_gradient(d_rows, low, expert, update, mask)
        if down.bias is not None:
            d_factors[part] = d_y @ down.bias[expert].to(d_y.dtype)
        if low is not None:
            weighted = low.mul_(factors[part]), d_y.mul_(factors[part])
            _update_gradients(d_update, *weighted, rows, expert, down, update, mask)
    d_factors += product.mul_(d_product).sum(-1, dtype=d_factors.dtype)
    d_weights = torch.empty_like(d_factors).index_copy_(0, pairs.order, d_factors)
    return d_product.mul_(factors), d_weights.view(weights.shape).to(weights.dtype)


def _widen_gradients(
    d_wide: Tensor,
    hidden: Tensor,
    pairs: _Pairs,
    wide: Projection,
    update: StackedUpdate,
    d_update: StackedUpdate,
    *,
    wants_input: bool,
) -> Tensor | None:
    """Return dL/dhidden [N, H]; `d_wide` is dL/dwide [S, wide]. Writes dL/dA and dL/dB to `d_update`."""
    total = torch.zeros_like(hidden, dtype=_sum_dtype(hidden.dtype)) if wants_input else None
    room, gathered = _Room(hidden, _sum_dtype(hidden.dtype)), torch.empty_like(hidden)
    masks = _Masks(wide.dropout, len(hidden), pairs, hidden, by_pair=False)
    for expert, part in pairs:
        tokens, mask, d_y = pairs.tokens[part], masks.of(part), d_wide[part]
        low = _low_gradient(d_y, expert, wide, update)
        if low is not None:
            rows = _gathered(hidden, tokens, gathered)
            _update_gradients(d_update, low, d_y, rows, expert, wide, update, mask)
        if total is not None:
            d_rows = room.rows(part)
            torch.mm(d_y, wide.matrix(expert, hidden.dtype), out=d_rows)
            if low is not None:
                _add_input_gradient(d_rows, low, expert, update, mask)
            total.index_add_(0, tokens, room.widened(part))
    return None if total is None else total.to(hidden.dtype)


def _add_update(
    output: Tensor,
    rows: Tensor,
    expert: int,
    projection: Projection,
    update: StackedUpdate,
    mask: Tensor | None,
) -> None:
    """Add the bias and the low-rank update of an expert to its `output` [n, out], in place."""
    if projection.bias is not None:
        output.add_(projection.bias[expert].to(output.dtype))
    if update.a is not None and update.b is not None:
        low = _dropped(rows, mask) @ update.a[expert].T
        output.addmm_(low, update.b[expert].T, alpha=projection.factor)


def _low_gradient(d_y: Tensor, expert: int, projection: Projection, update: StackedUpdate) -> Tensor | None:
    """Return dL/d(A x) [n, rank] = factor * dL/dy B; None without an update."""
    if update.b is None:
        return None
    return (d_y @ update.b[expert]).mul_(projection.factor)


def _add_input_gradient(
    d_rows: Tensor, low: Tensor, expert: int, update: StackedUpdate, mask: Tensor | None
) -> None:
    """Add the part of dL/drows [n, in] that goes through A, in place."""
    assert update.a is not None
    if mask is None:
        d_rows.addmm_(low, update.a[expert])
    else:
        d_rows.add_((low @ update.a[expert]).mul_(mask))


def _update_gradients(
    d_update: StackedUpdate,
    low_gradient: Tensor,
    d_y: Tensor,
    rows: Tensor,
    expert: int,
    projection: Projection,
    update: StackedUpdate,
    mask: Tensor | None,
) -> None:
    """Write dL/dA and dL/dB of an expert to `d_update`."""
    assert d_update.a is not None
    assert d_update.b is not None
    assert update.a is not None
    dropped = _dropped(rows, mask)
    d_update.a[expert] += low_gradient.T @ dropped
    low = dropped @ update.a[expert].T
    # dL/dB transposed: on a CPU the product with few rows is several times faster than that with few columns
    d_update.b[expert] += (low.T @ d_y).mul_(projection.factor).T


def _gathered(source: Tensor, tokens: Tensor, room: Tensor) -> Tensor:
    """Copy the rows `tokens` of `source` [N, H] to the start of `room`, and return them."""
    return torch.index_select(source, 0, tokens, out=room[: len(tokens)])


def _zeros_like(update: StackedUpdate) -> StackedUpdate:
    return StackedUpdate(*(None if tensor is None else torch.zeros_like(tensor) for tensor in update))


def _dropped(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
