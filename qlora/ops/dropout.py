"""Dropout whose mask is a function of a seed: drawn in the forward, drawn again in the backward, never kept.

A kept mask is a byte an element: for the seven linears of a layer of Llama 3.1 8B 39 KB a token, 0.4 of all that
the layer keeps besides.

In training the mask of a row is a function of (seed, step, layer, the row's number in the global batch), whatever the
micro-batch that the row comes in, its padding, and the process that works on it. Of a layer whose tokens are not the
batch's, such as an expert, it is one of the micro-batch. Elsewhere the seed comes from torch's CPU generator, so
`torch.manual_seed` decides it on every device without waiting for one, and torch's checkpointing, which replays that
generator, draws the same mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qlora.runtime.fake import is_fake, real_values
from qlora.runtime.seeds import fold_seed

Result = TypeVar("Result")

PIECE = 16_384
"""tokens whose mask is drawn together, so that an operation may also go through long rows a piece at a time; one that
dequantizes its weights anew for each piece does 2% more work for it"""

CHUNK = 2_048
"""tokens of a row that are drawn together: what of them lies outside of a piece is drawn for nothing"""


class Rows(NamedTuple):
    """The rows of a micro-batch, as they lie among the tokens that a layer sees."""

    first: int
    """number of the first row in the step's global batch"""
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    """tokens, without padding"""
    total: int
    """tokens, with all padding"""


class Dropout(NamedTuple):
    """One mask over some tokens: `rate` of their elements become zero. The others are not rescaled here."""

    rate: float
    seed: int
    rows: Rows | None = None
    """of the batch, where it is known"""
    piece: int | None = None
    """number of the piece of the batch that the mask is for; None: it is for all tokens"""

    def of_piece(self, number: int, tokens: int) -> "Dropout":
        """What the mask is made of, for the piece `number` of all `tokens` alone."""
        return self._over(tokens)._replace(piece=number)

    def mask(self, x: Tensor) -> Tensor:
        """True where an element of x [N, H] gets through: the same at every call."""
        whole = self if self.piece is not None else self._over(len(x))
        if whole.rows is not None:
            return whole._by_row(x, whole.rows)
        mask = torch.empty_like(x, dtype=torch.bool)
        for number, part in enumerate(mask.split(PIECE), self.piece or 0):
            whole._draw(part, number)
        return mask

    def _over(self, tokens: int) -> "Dropout":
        """The mask over so many tokens: if they are not the batch's, such as an expert's, the rows do not count."""
        if self.rows is None or self.rows.total == tokens:
            return self
        return self._replace(rows=None, seed=fold_seed(self.seed, self.rows.first))

    def _by_row(self, x: Tensor, rows: Rows) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool)  # [N, H]
        if sum(rows.lengths) < rows.total:
            mask.fill_(True)  # the padding
        start = PIECE * (self.piece or 0)
        stop = start + len(x)
        for row, (begin, length) in enumerate(zip(rows.starts, rows.lengths, strict=True), rows.first):
            for chunk, low in enumerate(range(begin, begin + length, CHUNK)):
                high = min(low + CHUNK, begin + length)
                if start <= low and high <= stop:
                    self._draw(mask[low - start : high - start], row, chunk)
                elif low < stop and start < high:
                    drawn = mask.new_empty(high - low, *mask.shape[1:])
                    self._draw(drawn, row, chunk)
                    inside = slice(max(low, start), min(high, stop))
                    mask[inside.start - start : inside.stop - start] = drawn[
                        inside.start - low : inside.stop - low
                    ]
        return mask

    def _draw(self, part: Tensor, *numbers: int) -> None:
        generator = None
        if not is_fake(part):  # which has no numbers
            generator = torch.Generator(part.device).manual_seed(fold_seed(self.seed, *numbers))
        part.bernoulli_(1 - self.rate, generator=generator)


@dataclass
class _Training:
    """The micro-batch that is being trained on."""

    seed: int
    first: int
    rows: Rows | None = None


_now: _Training | None = None  # of the process, since a GPU's backward runs in a thread of its own


@contextmanager
def drawn_by_row(seed: int, first: int) -> Iterator[None]:
    """Draw the masks of a micro-batch, forward and backward, by row; its rows are numbered from `first`."""
    global _now
    assert _now is None
    _now = _Training(seed, first)
    try:
        yield
    finally:
        _now = None


def rows_lie(starts: Sequence[int], lengths: Sequence[int], total: int) -> None:
    """Say where the rows of the micro-batch begin among all `total` tokens of a layer's input, and their lengths."""
    if _now is not None:
        _now.rows = Rows(_now.first, tuple(starts), tuple(lengths), total)


def with_these_rows(layer: Callable[..., Result]) -> Callable[..., Result]:
    """`layer` as it is called now and when it is recomputed, after another forward pass has laid its rows otherwise."""
    if _now is None:
        return layer
    training, rows = _now, _now.rows

    def run(*args: Any, **kwargs: Any) -> Result:
        before, training.rows = training.rows, rows
        try:
            return layer(*args, **kwargs)
        finally:
            training.rows = before

    return run


def draw(rate: float, layer: int | None = None) -> Dropout | None:
    """The mask of this rate for a layer, known by a number; None for a rate of 0, for which nothing is drawn."""
    if not rate:
        return None
    if _now is not None and layer is not None:
        seed = fold_seed(_now.seed, layer)
        return Dropout(rate, seed if _now.rows else fold_seed(seed, _now.first), _now.rows)
    with real_values():  # a forecast draws too: as often as the run does
        return Dropout(rate, int(torch.randint(2**62, (), device="cpu")))
