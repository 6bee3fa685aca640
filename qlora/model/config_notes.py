"""Remarks on what a base's config.json asks for and a run does otherwise, or only under a condition."""

from collections.abc import Iterator
from typing import Any

from qlora.quantization.mxfp4 import is_mxfp4
from qlora.recipe import Recipe

BALANCES = ("router_aux_loss_coef", "aux_loss_coef")
"""keys with the weight of the load-balancing loss of a mixture of experts: Mixtral and others, JetMoE"""


def config_notes(recipe: Recipe, config: Any) -> list[str]:
    """Return the remarks on a recipe and its base's transformers configuration."""
    text = config.get_text_config()
    return [*_mxfp4(recipe, config), *_balance(recipe, text), *_positions(recipe, text)]


def _mxfp4(recipe: Recipe, config: Any) -> Iterator[str]:
    """Say that experts in MXFP4 are held in another precision."""
    if is_mxfp4(config):
        precision = "NF4" if recipe.base.quantization == "nf4" else "16 bits"
        yield (
            "the checkpoint's experts are in MXFP4; a run dequantizes them as it reads them, and holds them in "
            f"{precision}"
        )


def _balance(recipe: Recipe, text: Any) -> Iterator[str]:
    """Say that the loss is without the load-balancing loss of experts, if the configuration asks for it."""
    key = next((key for key in BALANCES if getattr(text, key, None)), None)
    if key is None or not getattr(text, "output_router_logits", False):
        return
    adapter = recipe.adapter
    frozen = adapter.facts.frozen_base and not adapter.train_modules
    rest = (
        "; the routers are frozen" if frozen else ". Watch how the experts are used, or train with an adapter"
    )
    yield (
        "the loss is the cross-entropy alone, without the load-balancing loss that output_router_logits=true and "
        f"{key}={getattr(text, key):g} in config.json ask for{rest}"
    )


def _positions(recipe: Recipe, text: Any) -> Iterator[str]:
    """Say from which length on a row's positions depend on the rows beside it, if the recipe allows such rows."""
    found = [(limit, kind) for kind, limit in _changing_rope(text) if recipe.data.max_length > limit]
    if not found:
        return
    limit, kind = min(found)
    earlier = " and before" if "dynamic" in kind else ""
    yield (
        f"data.max_length={recipe.data.max_length}: rope_type={kind} in config.json turns all positions of a batch by "
        f"its longest document once that has more than {limit:,} tokens, so the loss of a row depends on the rows "
        f"beside{earlier} it. With data.max_length={limit} it does not"
    )


def _changing_rope(text: Any) -> Iterator[tuple[str, int]]:
    """Yield the kinds of rotary embeddings that change with the length of the input, and the length from which on."""
    settings = getattr(text, "rope_parameters", None) or {}
    per_kind = [one for one in settings.values() if isinstance(one, dict)]  # one for each kind of layer
    for one in per_kind or [settings]:
        kind = str(one.get("rope_type") or "")
        most = getattr(text, "max_position_embeddings", None)
        if kind == "longrope":
            own = getattr(text, "original_max_position_embeddings", None)
            most = one.get("original_max_position_embeddings") or own or most
        if (kind == "longrope" or "dynamic" in kind) and isinstance(most, int):
            yield kind, most
