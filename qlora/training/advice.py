"""Advice about a recipe's rank, targets, learning rate and batch, for the base and the rows at hand."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qlora.recipe import Adapter, Recipe
from qlora.recipe.evidence import (
    BATCH,
    CAPACITY,
    FULL_RATE,
    FULL_RATES,
    LARGE_BATCH,
    LORA_RATE,
    LORA_RATES,
    MEASURED_FULL_RATES,
    MEASURED_LORA_RATES,
    MEASURED_PARAMETERS,
    SMALLEST_PARAMETERS,
    TARGETS,
    Finding,
)
from qlora.recipe.sizes import parameters_text, three_digits
from qlora.report.facts import Row

TABLE = "documentation: Explanations, Advice"

MEASURED = (
    f"with a base of {parameters_text(MEASURED_PARAMETERS)} and other data, LoRA learned best at learning rates of "
    f"{MEASURED_LORA_RATES[0]:g} to {MEASURED_LORA_RATES[1]:g}, full fine-tuning at {MEASURED_FULL_RATES[0]:g} to "
    f"{MEASURED_FULL_RATES[1]:g}; ranks from 1 to 64 learned nearly the same (documentation: Benchmarks, Methods)"
)

HIGHEST_RANK = 256
"""the highest rank that is suggested"""


@dataclass(frozen=True)
class Advice:
    """Trained parameters beside trained tokens, and what published findings suggest to change."""

    method: str
    """the trained parameters in words"""
    trained_parameters: int
    trained_tokens: int
    """tokens in the loss, each counted once, whatever the number of epochs"""
    base_parameters: int
    suggestions: list[str]

    def rows(self) -> Iterator[Row]:
        """Yield the rows that `qlora check` prints."""
        ratio = three_digits(self.trained_parameters / self.trained_tokens)
        yield (
            "capacity",
            f"{self.method}: {self.trained_parameters:,} parameters for {self.trained_tokens:,} trained tokens, "
            f"{ratio} a token",
        )
        if self.base_parameters < SMALLEST_PARAMETERS:
            size = parameters_text(self.base_parameters)
            yield (
                "advice",
                f"none: published comparisons begin at 1B parameters, and this base has {size} ({TABLE})",
            )
            if self.base_parameters < 10 * MEASURED_PARAMETERS:
                yield "measured", MEASURED
        elif not self.suggestions:
            yield (
                "advice",
                f"rank, targets, learning rate and batch are as published findings suggest ({TABLE})",
            )
        for suggestion in self.suggestions:
            yield "advice", suggestion


def advise(
    recipe: Recipe,
    trained_tokens: int,
    base_parameters: int,
    trained_parameters: int,
    adapter_parameters: int,
) -> Advice:
    """Compare a recipe with the published findings.

    Args:
        recipe: the recipe.
        trained_tokens: tokens in the loss of one epoch.
        base_parameters: parameters of the base.
        trained_parameters: all parameters that the recipe trains.
        adapter_parameters: of these, those of the adapter at its first step, without what is trained beside it.
    """
    adapter = recipe.adapter
    suggestions: list[str] = []
    if base_parameters >= SMALLEST_PARAMETERS:
        if "rank" not in adapter.unused:
            suggestions += _rank(adapter, adapter_parameters, trained_tokens)
            suggestions += _targets(recipe)
        suggestions += _rate(recipe)
        if adapter.facts.frozen_base and recipe.training.global_batch_size >= LARGE_BATCH:
            rows = recipe.training.global_batch_size
            suggestions.append(_because(f"a step of {rows} rows is large for an adapter", BATCH))
    return Advice(adapter.summary, trained_parameters, trained_tokens, base_parameters, suggestions)


def _rank(adapter: Adapter, parameters: int, tokens: int) -> Iterator[str]:
    """Suggest a rank with as many parameters at the end as there are tokens.

    Nothing is suggested if another rank would not change the number of parameters in proportion: for VeRA, and for
    layers with ranks of their own.
    """
    if not (adapter.facts.grows_with_rank and parameters) or adapter.rank_pattern:
        return
    lowest = adapter.initial_rank * tokens / parameters
    if lowest <= adapter.rank:
        return
    enough = 2 ** math.ceil(math.log2(lowest))
    if enough <= HIGHEST_RANK:
        first = adapter.budget_at(enough).initial_rank
        settings = f"adapter.rank={enough}" + (f" adapter.budget.initial_rank={first}" if first else "")
        yield _because(f"{settings} has as many parameters as there are trained tokens", CAPACITY)
    else:
        yield _because(
            f"no rank up to {HIGHEST_RANK} has as many parameters as there are trained tokens; a high rank learns "
            "more of them, full fine-tuning most",
            CAPACITY,
        )


def _targets(recipe: Recipe) -> Iterator[str]:
    if recipe.adapter.targets == "attention":
        yield _because("adapter.targets=all-linear also adapts the MLPs", TARGETS)


def _rate(recipe: Recipe) -> Iterator[str]:
    full = not recipe.adapter.facts.frozen_base
    (low, high), finding = (FULL_RATES, FULL_RATE) if full else (LORA_RATES, LORA_RATE)
    if recipe.adapter.facts.rate_is_loras or full:
        lr = recipe.optimizer.lr
        if not low <= lr <= high:
            direction = "below" if lr < low else "above"
            yield _because(f"optimizer.lr={lr:g} is {direction} {low:g} to {high:g}", finding)


def _because(suggestion: str, finding: Finding) -> str:
    return f"{suggestion}. Found on {finding.models}: {finding.claim} ({finding.source})"
