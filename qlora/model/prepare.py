"""Assembly of a model for training: base, adapter, fused layers, checkpointing and optimizer.

Training and the memory forecast both use these functions, so that the forecast describes the training run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.adapter.adapted_linear import other_layers, trainable_parameters
from qlora.adapter.initial import InitialValues
from qlora.adapter.methods import METHODS
from qlora.errors import UsageError, listed
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.optim import Optimizer
from qlora.recipe import Checkpointing, Recipe
from qlora.runtime.device import on_cuda


def build(
    recipe: Recipe, device: torch.device | str, *, config: Any = None, start: Path | None = None
) -> tuple[PreTrainedModel, Optimizer]:
    """Load the recipe's base, adapt it, fuse and checkpoint its layers, and create the optimizer.

    Args:
        recipe: the recipe.
        device: device of the model.
        config: transformers' configuration; None means that of the base.
        start: folder of an adapter of the run that is resumed, which starts from the same initial values.

    Returns:
        The model, and the optimizer over its trainable parameters.

    Raises:
        QloraError: as `load_base` and `adapt`.

    Examples:
        >>> model, optimizer = build(Recipe.load("quickstart"), "cpu")
    """
    method, seed = METHODS[recipe.adapter.method], recipe.training.seed
    initial = start and InitialValues.stored(start, measured=True)
    initial = initial or method.initial_values(recipe.adapter, seed)
    model = load_base(recipe.base, device, seed=seed, config=config, initial=initial)
    apply_adapter(model, recipe)
    apply_checkpointing(model, recipe)
    return model, build_optimizer(model, recipe)


def apply_adapter(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Apply the recipe's adapter method to the model, in place, and return the model.

    Raises:
        UsageError: the targets are not linear layers: the loss, the fused layers and the forecast know only those.
    """
    METHODS[recipe.adapter.method].apply(model, recipe.adapter, recipe.training.seed)
    if others := other_layers(model):
        raise UsageError(
            f"adapter.targets: {listed(others)}: a recipe adapts linear layers only. Leave such layers out; "
            "convolutions and embeddings can be adapted from Python, with qlora.adapt"
        )
    return model


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
    """Create the recipe's optimizer over all trainable parameters; a step of several micro-batches sums exactly.

    factors: learning rates of the parameters as multiples of `optimizer.lr`; None means `lr_factors`.
    """
    settings = recipe.optimizer
    return Optimizer(
        trainable_parameters(model),
        lr_factors=lr_factors(model, recipe) if factors is None else factors,
        name=settings.name,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        exact_sums=recipe.training.accumulates,
    )
