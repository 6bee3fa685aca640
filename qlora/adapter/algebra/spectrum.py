"""Norm, spectrum and effective rank of an adapter's updates, layer by layer.

The LoRA documents leave the rank open ("r = 8 typically sufficient, r = 64 nearly optimal"). The spectrum of a trained
adapter is evidence: directions that hold no energy (squared singular values) were not needed. The spectrum cannot show
what a higher rank would have learned.

The experts of a layer share one rank, so a projection of theirs has one spectrum: each value is the root of the sum of
squares over the experts. Its norm is that of all experts, and its energy what `compress` keeps of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from qlora.adapter.algebra.low_rank import pooled
from qlora.adapter.algebra.tensors import Adapter
from qlora.storage.safetensors_files import ShardReader

MOST = 0.99
"""Share of the energy that a sufficient rank holds."""

TOO_LARGE, TOO_SMALL = 0.5, 0.75
"""Limits for the directions that hold this share of the energy, as a part of the rank. In the median layer, up to one
half means that the rank was too large; from three quarters on, it may have been too small. Both limits come from the
quickstart at ranks of 2 to 32 (docs/guides/adapters.md)."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a layer's update."""

    rank: int
    singular_values: list[float]
    """in falling order"""
    base_norm: float | None = None
    """Frobenius norm of the base's weight; None if unknown"""

    @property
    def norm(self) -> float:
        """Frobenius norm of scaling * B A."""
        return math.hypot(*self.singular_values)

    @property
    def relative_norm(self) -> float | None:
        """`norm` divided by `base_norm`; None if `base_norm` is unknown."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values, scaled to sum 1 (Roy and Vetterli 2007); 0 for a zero update."""
        total = sum(self.singular_values)
        shares = [value / total for value in self.singular_values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def energy_left(self) -> list[float]:
        """Share of the energy (squares) beyond the first 0, 1, ... directions, from 1 to 0; [] for a zero update."""
        left = list(accumulate((value**2 for value in reversed(self.singular_values)), initial=0.0))
        return [value / left[-1] for value in reversed(left)] if left[-1] else []

    def rank_for(self, energy: float) -> int:
        """Return the number of leading directions that hold the share `energy` (0-1); 0 for a zero update."""
        return next((rank for rank, left in enumerate(self.energy_left) if left <= 1 - energy + 1e-12), 0)

    @property
    def last_quarter(self) -> float:
        """Share of the energy in the last quarter of the singular values (at least one value)."""
        count = len(self.singular_values)
        return self.energy_left[count - max(1, count // 4)] if self.norm else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        return {
            "rank": self.rank,
            "norm": self.norm,
            "relative_norm": self.relative_norm,
            "effective_rank": self.effective_rank,
            "rank_90": self.rank_for(0.9),
            "rank_99": self.rank_for(MOST),
            "last_quarter": self.last_quarter,
            "singular_values": self.singular_values,
        }


def spectra(
    adapter: Adapter, base: ShardReader | None = None, norms: Mapping[str, float] | None = None
) -> dict[str, Spectrum]:
    """Return the spectrum of every layer's update, with the norms of the base's weights if they are known.

    Args:
        adapter: the adapter.
        base: the base's weights.
        norms: the norms of further weights by the names of their layers, such as those of experts.
    """
    known = norms or {}
    return {
        name: Spectrum(
            layer.rank,
            pooled(layer.update.singular_values()).tolist(),
            known.get(name) or (None if base is None else _base_norm(base, name)),
        )
        for name, layer in adapter.layers.items()
    }


def _base_norm(base: ShardReader, layer: str) -> float | None:
    stored = base.layer_weight(layer)
    if stored is None or stored.is_quantized:
        return None
    return torch.linalg.vector_norm(stored.read(), dtype=torch.float64).item()


@dataclass(frozen=True)
class Verdict:
    """Judgement of an adapter's rank."""

    kind: str
    """"too large", "fits", "may be too small" or "unclear" """
    sentence: str
    """the judgement in words, with the evidence"""
    enough: int | None = None
    """sufficient rank, if the rank was too large"""


LIMITS = (
    "A spectrum shows what was learned, not what a higher rank would have learned. Short or noisy training flattens "
    "the spectrum. Energy is not loss: the held-out loss decides."
)


def judge(layers: Mapping[str, Spectrum]) -> Verdict:
    """Judge from the spectra whether the adapter's rank was too large or too small."""
    learned = [layer for layer in layers.values() if layer.norm > 0]
    judged = [layer for layer in learned if len(layer.singular_values) > 1]
    if not learned:
        return Verdict("unclear", "Every update is zero: nothing was learned.")
    if not judged:
        return Verdict(
            "unclear", "Rank 1 has only one direction per layer, so there is no spectrum to judge it by."
        )
    needed = sorted(layer.rank_for(MOST) for layer in judged)
    share = median(layer.rank_for(MOST) / len(layer.singular_values) for layer in judged)
    evidence = (
        f"in the median layer {median(needed):g} directions hold {MOST:.0%} of the energy, and the last quarter of "
        f"the singular values holds {median(layer.last_quarter for layer in judged):.1%}"
    )
    rank = _ranks(judged)
    if share <= TOO_LARGE:
        enough = needed[math.ceil(0.9 * len(needed)) - 1]
        advice = f"Rank {enough} holds {MOST:.0%} in nine of ten layers."
        return Verdict("too large", f"Rank {rank} was more than needed: {evidence}. {advice}", enough)
    if share >= TOO_SMALL:
        return Verdict("may be too small", f"Rank {rank} may be too small: {evidence}.")
    return Verdict("fits", f"Rank {rank} fits what was learned: {evidence}.")


def _ranks(layers: list[Spectrum]) -> str:
    ranks = sorted({layer.rank for layer in layers})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
