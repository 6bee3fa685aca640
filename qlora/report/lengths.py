"""Shows the lengths of documents as text: a histogram, and the rows and tokens that other limits would lose."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

LIMITS = (256, 512, 1024, 2048, 4096, 8192)
"""limits that are compared, beside the one of the recipe"""

_BAR = 40
_BINS = 8


def histogram(lengths: Mapping[int, int]) -> Iterator[str]:
    """Yield lines of at most 80 columns: a range of lengths in tokens, its number of documents, and a bar.

    Args:
        lengths: length in tokens -> number of documents.
    """
    bins = {
        (first, last): sum(count for length, count in lengths.items() if first <= length <= last)
        for first, last in _bins(min(lengths), max(lengths))
    }
    most = max(bins.values())
    for (first, last), count in bins.items():
        bar = "#" * (-(-count * _BAR // most))
        yield f"{f'{first:,}-{last:,}':>15} {count:>10,} {bar}".rstrip()


def _bins(shortest: int, longest: int) -> list[tuple[int, int]]:
    """Return bins (first, last) that cover all lengths: of equal width if these are similar, else of powers of two."""
    if longest < 4 * shortest:
        width = -(-(longest - shortest + 1) // _BINS)
        return [(first, first + width - 1) for first in range(shortest, longest + 1, width)]
    steps = 2 if longest < 32 * shortest else 1  # for each power of two
    edges = [round(2 ** (number / steps)) for number in range(64)]
    bounds = [(first + 1, last) for first, last in pairwise([0, *edges]) if last > first]
    return [(first, last) for first, last in bounds if last >= shortest and first <= longest]


def limits(lengths: Mapping[int, int], current: int) -> Iterator[str]:
    """Yield lines about limits below the longest document: the rows and tokens that dropping and truncating lose.

    Args:
        lengths: length in tokens -> number of documents.
        current: the limit of the recipe.
    """
    rows, tokens = sum(lengths.values()), sum(length * count for length, count in lengths.items())
    for limit in sorted({*LIMITS, current}):
        longer = {length: count for length, count in lengths.items() if length > limit}
        if not longer:
            return
        dropped = sum(length * count for length, count in longer.items())
        cut = dropped - limit * sum(longer.values())
        count = sum(longer.values())
        yield (
            f"{limit:>15,}{' (now)' if limit == current else '      '} {count:>10,} rows ({count / rows:.0%}), "
            f"{dropped / tokens:.0%} of tokens; truncated {cut / tokens:.0%}"
        )
