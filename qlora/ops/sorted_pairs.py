"""The pairs (token, chosen expert) of a layer, sorted by expert and cut into pieces of bounded size.

An expert reads consecutive pairs. Consecutive experts form a group, which is processed at once; a group with more pairs
than a piece has room for is processed in several pieces. So the memory of a pass depends on the number of pairs and of
experts, not on how the router spreads the tokens.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.kernels.grouped import Spans
from qlora.runtime.device import on_cuda
from qlora.runtime.fake import is_fake

LEAST_ROOM = 64
"""pairs that a piece has room for at least"""

SPREAD = 2
"""room of a piece, in pairs of a group when all experts have equally many"""

TILES = (16, 32, 64)
"""rows; on a CPU, products in 16 bits have one of these numbers of rows, or a multiple of the last: oneDNN generates
machine code for each number, which would take most of a step and fill memory"""


class Piece(NamedTuple):
    """Consecutive pairs of a group of experts."""

    pairs: slice
    """part of the sorted pairs"""
    rows: int
    """number of pairs, rounded up to the number of rows that products have"""
    spans: Spans
    """rows of each expert, counted from the start of the piece; the padding belongs to the last one"""

    @property
    def size(self) -> int:
        """Number of pairs."""
        return int(self.pairs.stop - self.pairs.start)

    @property
    def padded(self) -> slice:
        """The pairs and the padding after them."""
        return slice(self.pairs.start, self.pairs.start + self.rows)


class Group(NamedTuple):
    """Consecutive experts with all of their pairs."""

    experts: slice
    pieces: list[Piece]


class SortedPairs:
    """The pairs (token, chosen expert), sorted by expert.

    Args:
        choices: numbers of the experts [N, K]. A number from `experts` on chooses none; such pairs come last.
        experts: number of experts.
        group: number of experts that are processed at once.
        dtype: dtype of the products.

    Attributes:
        count: number of pairs S.
        padded: rows of a tensor that has a row for each sorted pair, and the padding of the last piece.
        order: number of each sorted pair in the flat choices [S].
        tokens: token of each sorted pair [S].
        room: rows that the products of a piece have at most.
    """

    def __init__(self, choices: Tensor, experts: int, group: int, dtype: torch.dtype) -> None:
        self.count, self.choices_a_token = choices.numel(), choices.shape[1]
        self._tiles = TILES if not on_cuda(choices) and dtype.itemsize < 4 else (1,)
        self.padded = self.count + self._tiles[-1] - 1
        average = -(self.count * group // -experts)
        self.room = self._rounded(min(self.count, max(LEAST_ROOM, SPREAD * average)))
        flat = choices.reshape(-1)
        self.order = flat.argsort(stable=True)
        self.tokens = self.order // self.choices_a_token
        self._experts, self._group = experts, group
        if is_fake(choices):  # no numbers: one full piece shows all that is allocated
            pairs = min(self.count, self.room)
            self._on_device = choices.new_empty(experts)
            self._ends = [pairs] * experts
            self._groups = range(0, group, group)
            return
        self._on_device = torch.bincount(flat, minlength=experts)[:experts].cumsum(0)
        self._ends = self._on_device.tolist()
        self._groups = range(0, experts, group)

    @property
    def chosen(self) -> int:
        """Number of pairs that have an expert."""
        return self._ends[-1]

    def __iter__(self) -> Iterator[Group]:
        """Yield the groups that have pairs."""
        for first in self._groups:
            last = min(first + self._group, self._experts)
            start, end = self._ends[first - 1] if first else 0, self._ends[last - 1]
            if end > start:
                cuts = [*range(start, end, self.room), end]
                pieces = [self._piece(first, last, *cut) for cut in pairwise(cuts)]
                yield Group(slice(first, last), pieces)

    def _piece(self, first: int, last: int, start: int, end: int) -> Piece:
        rows = self._rounded(end - start)
        ends = [min(max(stop - start, 0), end - start) for stop in self._ends[first:last]]
        on_device = None
        if on_cuda(self.order) or last - first > 1:
            on_device = (self._on_device[first:last] - start).clamp(0, end - start)
        return Piece(slice(start, end), rows, Spans((*ends[:-1], rows), on_device))

    def _rounded(self, rows: int) -> int:
        tile = next((tile for tile in self._tiles if rows <= tile), self._tiles[-1])
        return -(rows // -tile) * tile
