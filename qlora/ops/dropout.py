"""Dropout whose mask is a function of a seed: drawn in the forward, drawn again in the backward, never kept.

A kept mask is a byte an element: for the seven linears of a layer of Llama 3.1 8B 39 KB a token, 0.4 of all that
the layer keeps besides. The seed comes from torch's CPU generator, so `torch.manual_seed` decides it on every device
without waiting for one, and torch's checkpointing, which replays that generator, draws the same mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qlora.runtime.fake import is_fake, real_values

PIECE = 16_384
"""tokens whose mask is drawn together, so that an operation may also go through long rows a piece at a time; one that
dequantizes its weights anew for each piece does 2% more work for it"""


class Dropout(NamedTuple):
    """One mask over some rows: `rate` of their elements become zero. The others are not rescaled here."""

    rate: float
    seed: int

    def of_piece(self, number: int) -> "Dropout":
        """What the mask is made of, for the piece `number` of the rows alone."""
        return self._replace(seed=self.seed + number)

    def mask(self, rows: Tensor) -> Tensor:
        """True where an element of rows [N, H] gets through: the same at every call."""
        mask = torch.empty_like(rows, dtype=torch.bool)
        for number, part in enumerate(mask.split(PIECE)):
            generator = None
            if not is_fake(rows):
                generator = torch.Generator(rows.device).manual_seed(self.seed + number)
            part.bernoulli_(1 - self.rate, generator=generator)
        return mask


def draw(rate: float) -> Dropout | None:
    """The next mask of this rate; None for a rate of 0, for which nothing is drawn."""
    if not rate:
        return None
    with real_values():  # a forecast draws too: as often as the run does
        return Dropout(rate, int(torch.randint(2**62, (), device="cpu")))
