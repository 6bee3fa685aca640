"""Shares of several sources in an epoch, and the rows that an epoch takes of each, as pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora.data.order import permutation

_PASS = 2**63
"""first of the epoch numbers that are reserved for passes over a source; no training epoch reaches it"""
_PASSES = 2**40


@dataclass(frozen=True, slots=True)
class Share:
    """Consecutive training rows of one source, and the number of them that an epoch uses."""

    total: int
    per_epoch: int
    """above `total`, rows repeat within an epoch; below it, the next epoch continues with the other rows"""

    def of_packed(self, rows: int) -> "Share":
        """Return the same share of this number of packed rows."""
        return Share(rows, max(1, round(rows * self.per_epoch / self.total)) if rows else 0)


def shares(
    totals: Sequence[int], weights: Sequence[float | None], rows: Sequence[int | None]
) -> tuple[Share, ...]:
    """Return the share of each source.

    An epoch of weighted sources has as many rows as all of them together, divided by the weights.

    Args:
        totals: number of training rows of each source.
        weights: relative share of each source; all None if the sources have no weights.
        rows: number of rows of an epoch; None for all.
    """
    if any(weights):
        sizes = [weight or 0.0 for weight in weights]
        exact = np.array(sizes) / sum(sizes) * sum(totals)
        whole = np.floor(exact).astype(int)
        # the rows that are left go to the largest remainders
        whole[np.argsort(whole - exact, kind="stable")[: sum(totals) - whole.sum()]] += 1
        counts = [max(1, count) for count in whole.tolist()]
    else:
        counts = [total if count is None else count for total, count in zip(totals, rows, strict=True)]
    return tuple(Share(*pair) for pair in zip(totals, counts, strict=True))


def epoch_rows(shares: Sequence[Share], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the row numbers that an epoch uses, source after source. They depend only on the arguments.

    Every row of a source is used equally often: epochs take consecutive pieces of an endless sequence of permutations.
    """
    starts = np.cumsum([0, *(share.total for share in shares)])
    return np.concatenate(
        [
            start + _rows(share, seed, source, epoch)
            for source, (start, share) in enumerate(zip(starts[:-1], shares, strict=True))
        ]
    )


def _rows(share: Share, seed: int, source: int, epoch: int) -> NDArray[np.int64]:
    total, count = share.total, share.per_epoch
    if count == total:
        return np.arange(total)
    first, last = epoch * count // total, ((epoch + 1) * count - 1) // total
    passes = [
        permutation(total, seed, _PASS + source * _PASSES + number) for number in range(first, last + 1)
    ]
    start = epoch * count - first * total
    return np.concatenate(passes)[start : start + count]
