"""Facts about each adapter method that a recipe needs; the methods themselves are in `qlora.adapter.methods`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.recipe.rank_budget import RankBudget

LOW_RANK_KEYS = (
    "rank", "alpha", "dropout", "scaling", "init", "lr_ratio", "expert_rank", "rank_pattern", "alpha_pattern",
)  # fmt: skip

BUDGET_KEYS = tuple(f"budget.{key}" for key in RankBudget.model_fields)

BROUGHT_KEYS = (
    "rank", "alpha", "scaling", "init", "expert_rank", "targets", "rank_pattern", "alpha_pattern", *BUDGET_KEYS,
)  # fmt: skip
"""keys whose values an adapter brings along that a run continues"""


@dataclass(frozen=True)
class MethodFacts:
    """Facts about one method, for the rules of a recipe and the advice of a forecast."""

    summary: str
    """the trained parameters in words, with fields of the section `adapter` in braces"""
    continued: str | None = None
    """the same for a run that continues the adapter in `folder`; None if this method cannot"""
    frozen_base: bool = True
    """True if the base is not trained: it can be in NF4, and the result is an adapter; else the result is a model"""
    unused: tuple[str, ...] = ()
    """keys of the section `adapter` that have no effect"""
    starts_from_weights: bool = False
    """True if `init` can be pissa or loftq"""
    rate_is_loras: bool = False
    """True if the learning rates that were found for LoRA are right for this method too"""
    grows_with_rank: bool = False
    """True if the number of trained parameters is proportional to the rank, or nearly (DoRA's norms have none)"""
    fused: bool = False
    """True if qlora's own passes compute the decoder layers, which can then recompute their MLP alone"""
    plans_its_length: bool = False
    """True if more than the learning rate depends on the number of steps, which can then not change at a resume"""


METHODS = {
    "lora": MethodFacts(
        "LoRA of rank {rank} on {targets}",
        "LoRA continued from {folder}",
        unused=BUDGET_KEYS,
        starts_from_weights=True,
        rate_is_loras=True,
        grows_with_rank=True,
        fused=True,
    ),
    "dora": MethodFacts(
        "DoRA of rank {rank} on {targets}",
        "DoRA continued from {folder}",
        unused=("expert_rank", *BUDGET_KEYS),
        rate_is_loras=True,
        grows_with_rank=True,
    ),
    "adalora": MethodFacts(
        "AdaLoRA of rank {rank} on average on {targets}",
        unused=("scaling", "init", "lr_ratio", "expert_rank", "rank_pattern", "alpha_pattern"),
        grows_with_rank=True,
        plans_its_length=True,
    ),
    "vera": MethodFacts(
        "VeRA of rank {rank} on {targets}",
        unused=(
            "alpha",
            "scaling",
            "init",
            "lr_ratio",
            "expert_rank",
            "rank_pattern",
            "alpha_pattern",
            *BUDGET_KEYS,
        ),
    ),
    "full": MethodFacts(
        "all weights trained",
        frozen_base=False,
        unused=(*LOW_RANK_KEYS, *BUDGET_KEYS, "targets", "train_tokens", "train_modules", "from"),
    ),
    "bitfit": MethodFacts(
        "biases of {targets}", "biases continued from {folder}", unused=(*LOW_RANK_KEYS, *BUDGET_KEYS)
    ),
}


def summary_of(
    facts: MethodFacts, settings: Mapping[str, Any], tokens: str | Sequence[str], modules: Sequence[str]
) -> str:
    """Return a short description of the trained parameters: those of the method, and tokens and modules beside it.

    settings: rank, targets, and the folder of the adapter that is continued or None.
    """
    targets = settings["targets"]
    layers = targets if isinstance(targets, str) else f"{len(targets)} targets"
    continued = facts.continued if settings["folder"] is not None else None
    parts = [(continued or facts.summary).format(**{**settings, "targets": layers})]
    if tokens:
        count = f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
        parts.append(f"rows of {'new tokens' if tokens == 'new' else count}")
    return ", ".join([*parts, *modules])
