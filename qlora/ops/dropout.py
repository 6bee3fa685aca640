"""Dropout with a mask that is a function of a seed: drawn in the forward, drawn again in the backward, never stored.

A stored mask takes a byte per element. For the seven linears of a layer of Llama 3.1 8B this is 39 KB per token, 0.4
times the memory of all other saved activations of the layer.

In training, the mask of a row depends on (seed, step, layer, the row's number in the global batch) only, not on its
micro-batch, its padding or the process. If a layer sees other tokens than the batch's, as an expert does, its mask
depends on the micro-batch instead. Outside of training the seed comes from torch's CPU generator. `torch.manual_seed`
then fixes it on every device without a synchronisation, and torch's checkpointing, which replays this generator,
draws the same mask again.
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
"""Tokens per piece. An operation can process long inputs piece by piece with the same masks; dequantizing its weights
again for each piece costs 2% more work."""

CHUNK = 2_048
"""Tokens of a row that are drawn together. If a piece needs only part of a chunk, the rest is drawn and discarded."""


class Rows(NamedTuple):
    """Positions of a micro-batch's rows among the tokens that a layer sees."""

    first: int
    """number of the first row in the step's global batch"""
    starts: tuple[int, ...]
    """position of the first token of each row"""
    lengths: tuple[int, ...]
    """tokens of each row, without padding"""
    total: int
    """all tokens, with padding"""


class Dropout(NamedTuple):
    """A dropout mask that zeroes a share `rate` of the elements. It does not rescale the others."""

    rate: float
    seed: int
    rows: Rows | None = None
    """rows of the batch, if known"""
    piece: int | None = None
    """number of the piece that the mask covers; None: the mask covers all tokens"""

    def of_piece(self, number: int, tokens: int) -> "Dropout":
        """Restrict the mask over `tokens` tokens to the piece `number`."""
        return self._over(tokens)._replace(piece=number)

    def mask(self, x: Tensor) -> Tensor:
        """Return a bool tensor [N, H], True where an element of x is kept; the same at every call."""
        whole = self if self.piece is not None else self._over(len(x))
        if whole.rows is not None:
            return whole._by_row(x, whole.rows)
        mask = torch.empty_like(x, dtype=torch.bool)
        for number, part in enumerate(mask.split(PIECE), self.piece or 0):
            whole._draw(part, number)
        return mask

    def _over(self, tokens: int) -> "Dropout":
        """Fit the mask to `tokens` tokens; without rows if these are not the batch's tokens, as in an expert."""
        if self.rows is None or self.rows.total == tokens:
            return self
        return self._replace(rows=None, seed=fold_seed(self.seed, self.rows.first))

    def _by_row(self, x: Tensor, rows: Rows) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool)  # [N, H]
        if sum(rows.lengths) < rows.total:
            mask.fill_(True)  # the padding
        start = PIECE * (self.piece or 0)
        stop = start + len(x)
        fake = is_fake(mask)  # a forecast has many rows, and these draws allocate nothing
        for row, (begin, length) in enumerate(zip(rows.starts, rows.lengths, strict=True), rows.first):
            for chunk, low in enumerate(range(begin, begin + length, CHUNK)):
                high = min(low + CHUNK, begin + length)
                if start <= low and high <= stop:
                    if not fake:
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
        if not is_fake(part):  # a fake tensor has no numbers
            generator = torch.Generator(part.device).manual_seed(fold_seed(self.seed, *numbers))
        part.bernoulli_(1 - self.rate, generator=generator)


@dataclass
class _Training:
    """The micro-batch in training."""

    seed: int
    first: int
    rows: Rows | None = None


_now: _Training | None = None  # not thread-local, because a GPU's backward runs in a separate thread


@contextmanager
def masks_by_row(seed: int, first: int) -> Iterator[None]:
    """Within the context, draw the masks of a micro-batch by row; its rows are numbered from `first`."""
    global _now
    assert _now is None
    _now = _Training(seed, first)
    try:
        yield
    finally:
        _now = None


def set_row_positions(starts: Sequence[int], lengths: Sequence[int], total: int) -> None:
    """Set the start and length of each row of the micro-batch among the `total` tokens of a layer's input."""
    if _now is not None:
        _now.rows = Rows(_now.first, tuple(starts), tuple(lengths), total)


def keep_row_positions(layer: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap `layer` to use the current row positions also in a recompute, after another forward has set others."""
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
    """Return a mask of this rate for the layer number `layer`; None for a rate of 0."""
    if not rate:
        return None
    if _now is not None and layer is not None:
        seed = fold_seed(_now.seed, layer)
        return Dropout(rate, seed if _now.rows else fold_seed(seed, _now.first), _now.rows)
    with real_values():  # a forecast draws a seed too, as often as the run
        return Dropout(rate, int(torch.randint(2**62, (), device="cpu")))
