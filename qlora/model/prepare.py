"""Assembly of a model for training: base, adapter, fused layers, checkpointing and optimizer.

Training and the memory forecast both use these functions, so that the forecast describes the training run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.adapted_linear import other_layers, trainable_parameters
from qlora.adapter.experts import expert_notes
from qlora.adapter.identity import UNQUANTIZED, BaseIdentity, in_4_bits, quantization_text
from qlora.adapter.initial import InitialValues, prepared_base
from qlora.adapter.methods import METHODS
from qlora.adapter.start import StartAdapter, find_adapter
from qlora.adapter.targets import left_out
from qlora.adapter.trained_parts import targets_beside, train_modules, whole_modules
from qlora.adapter.trained_rows import TrainedRows
from qlora.data import prompt_digests
from qlora.errors import QloraError, UsageError, listed
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.decoder_layer import FusedLayer, unfused_layers, use_fused_layers, why_undescribed
from qlora.model.head import decoder_of
from qlora.model.load import MetaBase, load_base, meta_base
from qlora.model.router_loss import add_router_loss
from qlora.model.tokens import TrainedTokens
from qlora.optim import Optimizer
from qlora.recipe import Adapter, Base, Checkpointing, Recipe
from qlora.runtime.device import on_cuda


def build(
    recipe: Recipe, device: torch.device | str, *, config: Any = None, start: Path | None = None
) -> tuple[PreTrainedModel, Optimizer]:
    """Load the recipe's base, adapt it, fuse and checkpoint its layers, and create the optimizer.

    Args:
        recipe: the recipe.
        device: device of the model.
        config: transformers' configuration, which can be that of a part of the layers; None means that of the base.
        start: folder of an adapter of the run that is resumed, which has the same initial values.

    Returns:
        The model, and the optimizer over its trainable parameters.

    Raises:
        QloraError: as `load_base`, `adapt` and `add_router_loss`.

    Examples:
        >>> model, optimizer = build(Recipe.load("quickstart"), "cpu")
    """
    method, seed = METHODS[recipe.adapter.method], recipe.training.seed
    continued, part = recipe.adapter.start_from, config is not None
    if continued is not None and not part:
        start = find_adapter(Path(continued))
    initial = start and InitialValues.stored(start, measured=continued is None)
    initial = initial or method.initial_values(recipe.adapter, seed)
    model = load_base(recipe.base, device, seed=seed, config=config, initial=initial)
    apply_adapter(model, recipe, part=part)
    apply_checkpointing(model, recipe)
    add_router_loss(model, recipe.training.router_loss)
    return model, build_optimizer(model, recipe)


def apply_adapter(model: nn.Module, recipe: Recipe, *, part: bool = False) -> nn.Module:
    """Apply the recipe's adapter method to the model, in place, and train what the recipe trains beside the adapter.

    An adapter that the recipe continues gives its layers and modules; its numbers are loaded later.

    Args:
        model: a base without an adapter.
        recipe: the recipe.
        part: True if `model` has a part of the base's layers only, as in a forecast.

    Returns:
        The same model.

    Raises:
        UsageError: the targets are not linear layers: the loss, the fused layers and the forecast know only those.
    """
    settings = recipe.adapter
    modules: Sequence[str] = settings.train_modules
    with _keys_as_in_a_recipe():
        if settings.start_from is None:
            targets = targets_beside(model, settings.targets, modules)
            METHODS[settings.method].apply(
                model, settings.model_copy(update={"targets": targets}), recipe.training.seed
            )
        else:
            continued = StartAdapter.read(Path(settings.start_from), model, settings.method)
            continued.check_beside(settings.train_tokens, modules)
            continued.add_layers(model, settings.dropout, part=part)
            modules = continued.modules
    if others := other_layers(model):
        raise UsageError(
            f"adapter.targets: {listed(others)}: a recipe adapts linear layers only. Leave such layers out; "
            "convolutions and embeddings can be adapted from Python, with qlora.adapt"
        )
    if settings.train_tokens:
        TrainedTokens.of(recipe).train(model)
    if modules:
        with _keys_as_in_a_recipe():
            train_modules(model, modules)
    return model


def continue_adapter(model: nn.Module, recipe: Recipe, tokenizer: Any) -> list[str]:
    """Give an adapted model the numbers of the adapter that the recipe continues, and return remarks on it.

    Raises:
        ModelError: the adapter was trained on another base, or a tensor does not fit.
    """
    if recipe.adapter.start_from is None:
        return []
    continued = StartAdapter.read(Path(recipe.adapter.start_from), model, recipe.adapter.method)
    base = replace(BaseIdentity.of(model), **prompt_digests(recipe.data, tokenizer))
    return [*continued.check_base(base), *continued.load(model)]


def check_continued(recipe: Recipe, tokenizer: Any) -> list[str]:
    """Load the adapter that the recipe continues over its base without weights, and return remarks on it.

    Raises:
        ModelError: the adapter was trained on another base, or a tensor does not fit.
    """
    if recipe.adapter.start_from is None or recipe.base.init != "pretrained":
        return []
    meta = meta_base(recipe.base)
    apply_adapter(meta.model, recipe)
    continued = StartAdapter.read(Path(recipe.adapter.start_from), meta.model, recipe.adapter.method)
    base = replace(
        BaseIdentity.of(meta.model),
        quantization=_storage(recipe.base, meta),
        **prompt_digests(recipe.data, tokenizer),
    )
    remarks = continued.check_base(prepared_base(base, InitialValues.stored(continued.folder)))
    return [*remarks, *continued.load(meta.model)]


def _storage(base: Base, meta: MetaBase) -> str | None:
    """Return the quantization that the base will have; None if only its checkpoint knows."""
    if meta.prequantized:
        return None
    if base.quantization == "none":
        return UNQUANTIZED
    kind = in_4_bits("nf4", base.block_size, double=base.double_quant)
    return quantization_text([kind] if meta.quantized else [], [kind] if meta.experts else [])


@contextmanager
def _keys_as_in_a_recipe() -> Iterator[None]:
    """Name a key of the section `adapter` in full; the functions that one calls from Python say only `targets`."""
    try:
        yield
    except QloraError as error:
        key = str(error).partition(":")[0]
        if key not in Adapter.model_fields:
            raise
        raise type(error)(f"adapter.{error}") from error


def model_notes(model: nn.Module, tokenizer: Any, recipe: Recipe) -> list[str]:
    """Return remarks for the user about an adapted model: layers without an adapter, parts trained beside it."""
    return [
        *(left_out_notes(model, recipe.adapter.targets) if recipe.adapter.start_from is None else ()),
        *expert_notes(model),
        *unreached_notes(model),
        *part_notes(model, tokenizer),
        *layer_notes(model),
    ]


def layer_notes(model: nn.Module) -> list[str]:
    """Return a remark on the decoder layers that no spec describes, so that they keep transformers' own code."""
    layers = decoder_layers(model)
    found = [
        reason
        for layer in layers
        if not isinstance(layer, FusedLayer) and (reason := why_undescribed(model, layer))
    ]
    if not found:
        return []
    which = "the" if len(found) == len(layers) else f"{len(found)} of {len(layers)}"
    return [
        f"{which} decoder layers run transformers' own code, which keeps more activations than qlora's: {found[0]}"
    ]


def left_out_notes(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return a remark that names the layers that match the targets and get no adapter, see `left_out`."""
    names = left_out(model, targets) if AdaptedLayer.of(model) else []
    if not names:
        return []
    return [
        f"no adapter on {listed(names)}, which adapter.targets match: the code of the model or of a router reads their "
        "weights itself"
    ]


def unreached_notes(model: nn.Module) -> list[str]:
    """Return a remark that names the adapted layers outside the decoder, such as those of a vision tower."""
    reached = set(decoder_of(model).modules())
    outside = [name for name, layer in AdaptedLayer.of(model).items() if layer not in reached]
    if not outside:
        return []
    return [
        f"{len(outside)} adapted layers are outside the decoder ({listed(outside)}), so text does not train them. "
        'To leave them out, name the layers of the decoder in adapter.targets, for example ".*language_model.*_proj"'
    ]


def part_notes(model: nn.Module, tokenizer: Any) -> list[str]:
    """Return remarks for the user about the tokens and modules that are trained beside the adapter, if there is one."""
    if not AdaptedLayer.of(model):
        return []
    notes = []
    rows = TrainedRows.of(model)
    for module in list(rows.values())[:1]:
        tokens = listed(
            [f"{tokenizer.convert_ids_to_tokens(number)} ({number})" for number in module.ids], most=8
        )
        had = len(module.base.weight)
        added = f"; they extend {had:,} rows to {module.size:,}" if module.size > had else ""
        notes.append(f"train_tokens: rows of {tokens} in {' and '.join(rows)}{added}")
    if whole := whole_modules(model):
        notes.append(f"train_modules: {listed(list(whole), most=8)}")
    inside = sum(any(p.requires_grad for p in layer.parameters()) for layer in unfused_layers(model))
    if whole and inside:
        notes.append(
            f"{inside} decoder layers with modules trained as a whole run transformers' own forward pass, which keeps "
            "more activations than qlora's"
        )
    return notes


def checkpointed(recipe: Recipe, layers: int) -> tuple[int, int]:
    """Return how many of `layers` decoder layers the recipe recomputes as a whole, and how many only in their MLP."""
    setting = recipe.training.activation_checkpointing
    if isinstance(setting, Checkpointing):
        whole = min(setting.full, layers)
        return whole, min(setting.mlp, layers - whole)
    return {"none": (0, 0), "mlp": (0, layers), "full": (layers, 0)}[setting]


def apply_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Fuse the supported layers and set up the recipe's activation checkpointing, replacing any earlier setting."""
    use_fused_layers(model)
    layers = len(decoder_layers(model))
    if layers or recipe.training.activation_checkpointing not in ("none", Checkpointing()):
        counts = checkpointed(recipe, layers)
        on_gpu = on_cuda(next(model.parameters()))  # on a CPU the inputs are in host memory anyway
        checkpoint_layers(model, *counts, offload=recipe.training.activation_offloading and on_gpu)


def lr_factors(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Return the learning rate of each trainable parameter, as a multiple of `optimizer.lr`."""
    method = METHODS[recipe.adapter.method]
    return {name: method.lr_factor(name, recipe.adapter) for name in trainable_parameters(model)}


def build_optimizer(
    model: nn.Module, recipe: Recipe, factors: Mapping[str, float] | None = None
) -> Optimizer:
    """Create the recipe's optimizer over all trainable parameters; a step of several backward passes sums exactly.

    factors: learning rates of the parameters as multiples of `optimizer.lr`; None means `lr_factors`.
    """
    settings = recipe.optimizer
    penalised = METHODS[recipe.adapter.method].penalises(recipe.adapter)
    return Optimizer(
        trainable_parameters(model),
        lr_factors=lr_factors(model, recipe) if factors is None else factors,
        name=settings.name,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        exact_sums=recipe.training.accumulates or penalised,
    )
