"""Remarks on what a base's config.json asks for and a run does otherwise, or only under a condition."""

from collections.abc import Iterator
from typing import Any

from qlora.model.router_loss import Request, asks, coefficient_of, is_computed, is_supported
from qlora.quantization.mxfp4 import is_mxfp4
from qlora.recipe import Recipe


def config_notes(recipe: Recipe, config: Any) -> list[str]:
    """Return the remarks on a recipe and its base's transformers configuration.

    Raises:
        RecipeError: the recipe asks for a load-balancing loss that the base does not have.
    """
    text = config.get_text_config()
    return [*_mxfp4(recipe, config), *_router_loss(recipe, config), *_positions(recipe, text)]


def _mxfp4(recipe: Recipe, config: Any) -> Iterator[str]:
    """Say that experts in MXFP4 are held in another precision."""
    if is_mxfp4(config):
        precision = "NF4" if recipe.base.quantization == "nf4" else "16 bits"
        yield (
            "the checkpoint's experts are in MXFP4; a run dequantizes them as it reads them, and holds them in "
            f"{precision}"
        )


def _router_loss(recipe: Recipe, config: Any) -> Iterator[str]:
    """Say whether the loss includes the load-balancing loss of a mixture's routers, and why."""
    setting = recipe.training.router_loss
    request, coefficient = Request.of(config), coefficient_of(config, setting)
    asked = request is not None and request.asked
    in_config = f"{request.key}={request.coefficient:g}" if request else ""
    if coefficient:
        source = f"auto follows output_router_logits=true and {in_config} in config.json"
        yield (
            f"the loss is the cross-entropy plus {coefficient:g} times the load-balancing loss of the routers "
            f"(aux_loss): training.router_loss={source if setting == 'auto' else f'{coefficient:g}'}. Held-out losses "
            "are without it"
        )
    elif not is_computed(config):
        if asks(config):
            yield (
                "output_router_logits=true in config.json adds nothing to the loss: transformers computes no "
                f"load-balancing loss for {config.get_text_config().model_type}"
            )
    elif setting == "off" and asked:
        yield (
            "the loss is the cross-entropy alone, without the load-balancing loss that output_router_logits=true and "
            f"{in_config} in config.json ask for, as training.router_loss=off says"
        )
    elif setting == "auto" and request is not None:
        yield (
            f"the loss is the cross-entropy alone: config.json has {in_config} but does not set output_router_logits, "
            "so it asks for no load-balancing loss"
            + (f". training.router_loss={request.coefficient:g} adds it" if is_supported(config) else "")
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
