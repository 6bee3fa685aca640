"""LoRA settings of a whole adapter or of one layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from qlora.adapter.patterns import pattern_value
from qlora.errors import UsageError

SCALINGS = {
    "alpha/rank": lambda alpha, rank: alpha / rank,  # LoRA, section 4.1
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, Kalajdzievski 2023
    # alpha itself, as PEFT computes it from lora_alpha = alpha * rank: not a bit changes when an adapter is saved
    "alpha": lambda alpha, rank: alpha * rank / rank,
}
FROM_WEIGHTS = ("pissa", "loftq")
"""initialisations that need the base's 16-bit weights, see initial.py"""
MAX_ALPHA = 1e30
"""highest alpha, whose product with a factor of an ordinary size is finite in float32"""
INITS = ("kaiming", "gaussian", "orthogonal", *FROM_WEIGHTS, "zero")


@dataclass(frozen=True)
class LoraSpec:
    """LoRA settings (Hu et al. 2021), shared by all layers except those that a pattern matches.

    Raises:
        UsageError: a number is out of range, or `scaling` or `init` is unknown.

    Examples:
        >>> LoraSpec(rank=16, alpha=32, targets="all-linear").factor
        2.0
    """

    rank: int = 8
    """rank of the update: rows of A [rank, in], columns of B [out, rank]"""
    alpha: float | None = None
    """numerator of the scaling; None means alpha = rank, and is not allowed with the scaling "alpha\""""
    dropout: float = 0.0
    """share of A's input that is dropped in training, at least 0 and below 1"""
    scaling: str = "alpha/rank"
    """factor of the update: "alpha/rank" (LoRA), "alpha/sqrt(rank)" (rsLoRA) or "alpha", the same for every rank"""
    init: str = "kaiming"
    """initialisation of A: "kaiming" (uniform with a = sqrt(5), that is between -1/sqrt(in) and 1/sqrt(in)), "gaussian"
    (standard deviation 1/rank), "orthogonal" (random orthonormal rows, Saxe et al. 2014; orthonormal columns if the
    rank is above `in`) or "zero" (before an adapter is loaded). B is zero, so training starts at the base. (PEFT's
    "orthogonal" is another scheme: A and B are both nonzero, and their product is zero up to rounding.) Or "pissa" or
    "loftq": A and B from the base's weights, see `qlora.adapter.initial`; "pissa" changes the base"""
    expert_rank: int | None = None
    """rank of each expert of a mixture; None means the rank divided by the number of experts that a token passes
    through, but at least 1, so that a token meets about as many trained numbers as in a dense layer (Schulman and
    Thinking Machines Lab, "LoRA Without Regret", 2025)"""
    targets: str | Sequence[str] = "all-linear"
    """layers to adapt: "all-linear", "attention" or a list, see `qlora.adapter.select`"""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """ranks of single layers. A key is a regular expression that matches a layer's name or the last parts of the name;
    the first matching key counts"""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """alphas of single layers, with the same keys"""
    dtype: torch.dtype = torch.bfloat16
    """dtype of A and B; the optimizer keeps the bits that bf16 rounds away"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        if self.expert_rank is not None and self.expert_rank < 1:
            raise UsageError(f"expert_rank must be at least 1, not {self.expert_rank}")
        if not 0 < self.resolved_alpha <= MAX_ALPHA:
            raise UsageError(f"alpha must be above 0 and at most {MAX_ALPHA:g}, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.scaling not in SCALINGS:
            raise UsageError(f"scaling must be {' or '.join(SCALINGS)}, not {self.scaling!r}")
        if self.scaling == "alpha" and self.alpha is None:
            raise UsageError("scaling alpha needs a number in alpha, which is the factor itself, such as 1")
        if self.init not in INITS:
            raise UsageError(f"init must be {', '.join(INITS[:-1])} or {INITS[-1]}, not {self.init!r}")

    @property
    def resolved_alpha(self) -> float:
        """alpha, or the rank if alpha is None."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def numerator(self) -> float:
        """PEFT's lora_alpha, which has no scaling "alpha": alpha * rank then, so that lora_alpha / rank is alpha."""
        return self.resolved_alpha * self.rank if self.scaling == "alpha" else self.resolved_alpha

    @property
    def factor(self) -> float:
        """Factor of the update B A x."""
        return float(SCALINGS[self.scaling](self.resolved_alpha, self.rank))

    def for_layer(self, name: str) -> "LoraSpec":
        """Return the settings of the layer `name`, with its own rank and alpha."""
        return replace(
            self,
            rank=pattern_value(self.rank_pattern, name, self.rank),
            alpha=pattern_value(self.alpha_pattern, name, self.resolved_alpha),
        )
