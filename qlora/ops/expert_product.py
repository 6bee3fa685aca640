"""The product of sorted pairs with one projection of the experts, x W_e^T + bias_e + factor * (x A_e^T) B_e^T.

A and B of all experts have PEFT's layout: A [E * rank, in] has the rows of A_e one expert after another, and column
r * E + e of B [out, rank * E] is column r of B_e. A pass takes them apart for itself, so that no copy is kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora.kernels.grouped import grouped_outer, grouped_product
from qlora.ops.dropout import Dropout
from qlora.ops.sorted_pairs import Piece, SortedPairs


class Projection(NamedTuple):
    """Constants of one projection of all experts, with a low-rank update."""

    matrices: Callable[[slice, torch.dtype], Tensor]
    """called with the numbers of consecutive experts and a dtype: their frozen matrices [G, out, in]"""
    experts: int
    """number of matrices; those above the number of experts are not read"""
    out_features: int
    in_features: int
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
    """A [E, rank, in] and B transposed [E, rank, out] of all experts; both None without an update."""

    a: Tensor | None
    b: Tensor | None

    def of(self, experts: slice) -> "StackedUpdate":
        """Return views of A and B of some experts."""
        return StackedUpdate(*(None if tensor is None else tensor[experts] for tensor in self))


def stacked(a: Tensor | None, b: Tensor | None, experts: int, dtype: torch.dtype) -> StackedUpdate:
    """Return A and B of all experts in PEFT's layout as stacks in `dtype`."""
    if a is None or b is None:
        return StackedUpdate(None, None)
    rows = b.detach().view(len(b), -1, experts).permute(2, 1, 0)
    return StackedUpdate(a.detach().view(experts, -1, a.shape[1]).to(dtype), rows.to(dtype).contiguous())


def unstacked(
    gradients: StackedUpdate, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B in their layout and dtype."""
    d_a, d_b = gradients
    if a is None or b is None or d_a is None or d_b is None:
        return None, None
    return d_a.view(a.shape).to(a.dtype), d_b.permute(2, 1, 0).reshape(b.shape).to(b.dtype)


class ExpertProduct:
    """The product with one projection in one pass, first forward, then backward, for one piece of the pairs at a time.

    Args:
        projection: constants of the projection.
        update: A and B of all experts, in the dtype of the products.
        pairs: the sorted pairs.
        like: tokens [N, H]; their device and dtype are those of the products.
        by_pair: True if the input is a row for each pair, False if it is the row of the pair's token.

    Attributes:
        d_update: gradients of A and B, in the dtype of the products; `gradients` adds to them.
    """

    def __init__(
        self,
        projection: Projection,
        update: StackedUpdate,
        pairs: SortedPairs,
        like: Tensor,
        *,
        by_pair: bool,
    ) -> None:
        self.projection, self._all, self._dtype = projection, update, like.dtype
        self.d_update = StackedUpdate(None, None)
        self._matrices: Tensor | None = None
        self._mask: Tensor | None = None
        if projection.dropout is not None:
            # Rows of the mask are the tokens of the batch, so it does not depend on the micro-batch or on the routing
            width = projection.in_features * (pairs.choices_a_token if by_pair else 1)
            mask = projection.dropout.mask(like.new_empty(()).expand(len(like), width))
            self._mask = mask.view(-1, projection.in_features)
            self._row_of_mask = pairs.order if by_pair else pairs.tokens

    def enter(self, experts: slice) -> None:
        """Take the matrices of these experts, which the following pieces belong to."""
        self._matrices = None  # frees the last ones before others are dequantized
        self._matrices = self.projection.matrices(experts, self._dtype)
        self._experts, self._update = experts, self._all.of(experts)
        self._d_update = self.d_update.of(experts)

    def prepare_gradients(self) -> None:
        """Make the gradients of A and B, with zeros for experts without tokens."""
        self.d_update = StackedUpdate(*(None if one is None else torch.zeros_like(one) for one in self._all))

    def apply(self, x: Tensor, piece: Piece, out: Tensor) -> None:
        """Write the product of x [n, in] to `out` [n, out]."""
        grouped_product(x, self._frozen.transpose(1, 2), piece.spans, out)
        if self.projection.bias is not None:
            out.add_(self._bias(piece))
        a, b = self._update
        if a is not None and b is not None:
            low = self._low(_dropped(x, self._mask_of(piece)), a.transpose(1, 2), piece)
            grouped_product(low, b, piece.spans, out, add=True, alpha=self.projection.factor)

    def gradients(
        self, x: Tensor, d_y: Tensor, piece: Piece, d_x: Tensor | None, weights: Tensor | None = None
    ) -> None:
        """Write dL/dx to `d_x` [n, in] if given, and add to the gradients of A and B.

        Args:
            x: input [n, in].
            d_y: gradient of the output [n, out].
            piece: the pairs.
            d_x: where to write the gradient of x; not `x`.
            weights: factors of the outputs [n, 1]. The gradients of A and B are multiplied by them, but `d_x` is not.
        """
        if d_x is not None:
            grouped_product(d_y, self._frozen, piece.spans, d_x)
        (a, b), (d_a, d_b), factor = self._update, self._d_update, self.projection.factor
        if a is None or b is None or d_a is None or d_b is None:
            return
        mask, d_low = self._mask_of(piece), self._low(d_y, b.transpose(1, 2), piece).mul_(factor)
        if d_x is not None and mask is None:
            grouped_product(d_low, a, piece.spans, d_x, add=True)
        elif d_x is not None and mask is not None:
            d_x.add_(grouped_product(d_low, a, piece.spans, torch.empty_like(d_x)).mul_(mask))
        dropped = _dropped(x, mask)
        low = self._low(dropped, a.transpose(1, 2), piece)
        if weights is not None:
            d_low.mul_(weights)
            low.mul_(weights)
        grouped_outer(d_low, dropped, piece.spans, d_a)
        grouped_outer(low, d_y, piece.spans, d_b, alpha=factor)

    def along(self, x: Tensor, d_x: Tensor, d_y: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Return y . dL/dy [n] in `dtype` from x . dL/dx, without y. Overwrites `x`."""
        total = x.mul_(d_x).sum(-1, dtype=dtype)
        if self.projection.bias is not None:
            total += (d_y * self._bias(piece)).sum(-1, dtype=dtype)
        return total

    @property
    def _frozen(self) -> Tensor:
        assert self._matrices is not None, "enter a group first"
        return self._matrices

    def _low(self, rows: Tensor, matrices: Tensor, piece: Piece) -> Tensor:
        """Return the products [n, rank] of rows with A or B."""
        return grouped_product(rows, matrices, piece.spans, rows.new_empty(len(rows), matrices.shape[2]))

    def _bias(self, piece: Piece) -> Tensor:
        """Return the bias of each row, [n, out] or [1, out]."""
        assert self.projection.bias is not None
        bias = self.projection.bias[self._experts].to(self._dtype)
        if len(bias) == 1:
            return bias
        assert piece.spans.on_device is not None
        number = torch.arange(piece.rows, device=bias.device)
        return bias[torch.searchsorted(piece.spans.on_device, number, right=True)]

    def _mask_of(self, piece: Piece) -> Tensor | None:
        """Return the mask of the pairs [n, in], False for padding; None without dropout."""
        if self._mask is None:
            return None
        mask = self._mask[self._row_of_mask[piece.pairs]]
        return pad(mask, (0, 0, 0, piece.rows - piece.size))


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
