"""What a recipe makes of a base: adapter, passes of the layers, optimizer.

Training and forecast both come through here, so that the one speaks of the other.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.optim import Optimizer
from qlora.recipe import Checkpointing, Recipe
from qlora.runtime.device import on_cuda


def build(
    recipe: Recipe, device: torch.device | str, *, config: Any = None
) -> tuple[PreTrainedModel, Optimizer]:
    """Load the recipe's base on `device`, adapt it, give it our layers, and make the optimizer over what is trained.

    `config`: the architecture, where it is not that of the base. Raises QloraError as `load_base` and `adapt` do.

    >>> model, optimizer = build(Recipe.load("quickstart"), "cpu")
    """
    model = load_base(recipe.base, device, seed=recipe.training.seed, config=config)
    apply_adapter(model, recipe)
    apply_checkpointing(model, recipe)
    return model, build_optimizer(model, recipe)


def apply_adapter(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Make trainable what the recipe's `adapter` section says."""
    return METHODS[recipe.adapter.method].apply(model, recipe.adapter, recipe.training.seed)


def checkpointed(recipe: Recipe, layers: int) -> tuple[int, int]:
    """Of so many decoder layers, those that the recipe recomputes in the backward, and those whose MLP alone."""
    setting = recipe.training.activation_checkpointing
    if isinstance(setting, Checkpointing):
        whole = min(setting.full, layers)
        return whole, min(setting.mlp, layers - whole)
    return {"none": (0, 0), "mlp": (0, layers), "full": (layers, 0)}[setting]


def apply_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Give layers that we know our own passes, and recompute what the recipe says, whatever was said before."""
    use_fused_layers(model)
    layers = len(decoder_layers(model))
    if layers or recipe.training.activation_checkpointing not in ("none", Checkpointing()):
        counts = checkpointed(recipe, layers)
        on_gpu = on_cuda(next(model.parameters()))  # else the host's memory is what the layers compute in
        checkpoint_layers(model, *counts, offload=recipe.training.activation_offloading and on_gpu)


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over everything trainable."""
    settings = recipe.optimizer
    return Optimizer(
        trainable_parameters(model),
        name=settings.name,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
