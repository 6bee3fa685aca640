"""The settings of LoRA, of a whole adapter or of one layer of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from qlora.adapter.patterns import pattern_value
from qlora.errors import UsageError

SCALINGS = {
    "alpha/rank": lambda alpha, rank: alpha / rank,  # LoRA, section 4.1
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, Kalajdzievski 2023
}


@dataclass(frozen=True)
class LoraSpec:
    """Settings of LoRA: the same for every layer but those that a pattern matches.

        >>> LoraSpec(rank=16, alpha=32, targets="all-linear").factor
        2.0

    Raises UsageError for numbers out of range.
    """

    rank: int = 8
    """rows of A [rank, in], columns of B [out, rank]"""
    alpha: float | None = None
    """strength of the update, see `factor`; None: alpha = rank"""
    dropout: float = 0.0
    """share of the input of A that is dropped in training"""
    scaling: str = "alpha/rank"
    """or "alpha/sqrt(rank)" """
    init: str = "kaiming"
    """A's: "kaiming" (uniform, a = sqrt(5): the bound is 1/sqrt(in)), "gaussian" (standard deviation 1/rank) or "zero"
    (to read an adapter into); B is zero, so training starts at the base"""
    targets: str | Sequence[str] = "attention"
    """the linear layers, see `select`"""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """another rank or alpha where a key, a regular expression, matches a name or its last parts; the first counts"""
    dtype: torch.dtype = torch.bfloat16
    """of A and B; the optimizer keeps what bf16 would round away"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.resolved_alpha) and self.resolved_alpha > 0):
            raise UsageError(f"alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.scaling not in SCALINGS:
            raise UsageError(f"scaling must be {' or '.join(SCALINGS)}, not {self.scaling!r}")
        if self.init not in ("kaiming", "gaussian", "zero"):
            raise UsageError(f"init must be kaiming, gaussian or zero, not {self.init!r}")

    @property
    def resolved_alpha(self) -> float:
        """alpha, or the rank where alpha is None."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def factor(self) -> float:
        """Of B A x."""
        return float(SCALINGS[self.scaling](self.resolved_alpha, self.rank))

    def of_layer(self, name: str) -> "LoraSpec":
        """The settings of the layer `name`: its own rank and alpha."""
        return replace(
            self,
            rank=pattern_value(self.rank_pattern, name, self.rank),
            alpha=pattern_value(self.alpha_pattern, name, self.resolved_alpha),
        )
