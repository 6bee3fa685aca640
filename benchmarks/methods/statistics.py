"""Paired statistics over seeds: mean difference, confidence interval, t-test, Holm's correction.

Two settings with the same seed train on the same rows in the same order, so their difference is paired. With five seeds
an exact sign-flip test cannot go below p = 2/32, so the paired t-test (Student 1908) decides, with Holm's correction
(1979) over all comparisons of a table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """Mean of values with its 95% confidence interval; `half` is None for a single value."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return the interval of Student's t for independent values, at least one."""
        if len(values) == 1:
            return cls(values[0], None, 1)
        half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
        return cls(fmean(values), half, len(values))


@dataclass(frozen=True)
class Paired:
    """Difference of two settings over common seeds, first minus second."""

    difference: Interval
    p: float | None
    """two-sided p of the paired t-test; None with fewer than three seeds"""

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> "Paired":
        """Compare values by seed. Raises ValueError if no seed is common."""
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            raise ValueError("the settings have no seed in common")
        differences = [first[seed] - second[seed] for seed in seeds]
        return cls(Interval.of(differences), t_test(differences))


def t_test(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of a zero mean difference; None with fewer than three differences."""
    if len(differences) < 3:
        return None
    spread, mean = stdev(differences), fmean(differences)
    if spread == 0:
        return 0.0 if mean else 1.0
    return t_tail(mean / (spread / math.sqrt(len(differences))), len(differences) - 1)


def t_tail(t: float, freedom: int) -> float:
    """Return the two-sided tail probability of Student's t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        inside = sine * total
    return min(1.0, max(0.0, 1 - inside))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return the t that leaves `level` in both tails together, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > level else (low, middle)
    return high


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Return the p values corrected for their number (Holm 1979), each at most 1."""
    ordered = sorted(ps.items(), key=lambda item: item[1])
    corrected, highest = {}, 0.0
    for rank, (name, p) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p))
        corrected[name] = highest
    return {name: corrected[name] for name in ps}
