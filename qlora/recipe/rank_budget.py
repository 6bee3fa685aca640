"""The section `adapter.budget`: AdaLoRA's ranks during a run (Zhang et al. 2023, arXiv:2303.10512)."""

from qlora.recipe.section import Count, Decay, FactorOrZero, Section


class RankBudget(Section):
    """AdaLoRA's budget of ranks, which falls from `initial_rank` to `adapter.rank`, the average at the end."""

    initial_rank: Count | None = None
    """Rank of every layer at the start, at least `adapter.rank`; null: 1.5 times that (AdaLoRA, appendix)."""
    start: Decay = 0.1
    """Share of the steps before the ranks fall."""
    final: Decay = 0.4
    """Share of the steps after the ranks have fallen, with the final ranks."""
    every: Count = 10
    """Steps from one choice of the ranks to the next."""
    orthogonality: FactorOrZero = 0.1
    """Weight of the penalty that keeps the directions of an update orthogonal (AdaLoRA, equation 4: gamma)."""
    smoothing: Decay = 0.85
    """Decay rate of the average importance (AdaLoRA, equation 9: beta 1)."""
    uncertainty_smoothing: Decay = 0.85
    """Decay rate of the average distance from that average (AdaLoRA, equation 10: beta 2)."""
