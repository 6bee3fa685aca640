"""What a recipe makes of a base: adapter, passes of the layers, optimizer.

Training and forecast both come through here, so that the one speaks of the other.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.adapter.methods.lora import adapt, trainable_parameters
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.runtime.device import on_cuda


def build(
    recipe: Recipe, device: torch.device | str, *, config: Any = None
) -> tuple[PreTrainedModel, Optimizer]:
    """Load the recipe's base on `device`, adapt it, give it our layers, and make the optimizer over what is trained.

    `config`: the architecture, where it is not that of the base. Raises ModelError as `load_base` and `adapt` do.

    >>> model, optimizer = build(Recipe.load("quickstart"), "cpu")
    """
    model = load_base(recipe.base, device, seed=recipe.training.seed, config=config)
    apply_adapter(model, recipe)
    apply_checkpointing(model, recipe)
    return model, build_optimizer(model, recipe)


def apply_adapter(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Make trainable what the recipe's `adapter` section says: LoRA modules, or every weight."""
    adapter = recipe.adapter
    if adapter.method == "full":
        return model.requires_grad_(True)
    return adapt(
        model,
        rank=adapter.rank,
        alpha=adapter.resolved_alpha,
        dropout=adapter.dropout,
        scaling=adapter.scaling,
        init=adapter.init,
        targets=adapter.targets,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
        seed=recipe.training.seed,
    )


def checkpointed(recipe: Recipe, layers: int) -> tuple[int, int]:
    """Of so many decoder layers, those that the recipe recomputes in the backward, and those whose MLP alone."""
    training = recipe.training
    whole, mlps = (
        layers * setting if isinstance(setting, bool) else min(setting, layers)
        for setting in (training.gradient_checkpointing, training.mlp_checkpointing)
    )
    return whole, min(mlps, layers - whole)


def apply_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Give layers that we know our own passes, and recompute what the recipe says, whatever was said before."""
    use_fused_layers(model)
    layers = len(decoder_layers(model))
    if layers or recipe.training.gradient_checkpointing or recipe.training.mlp_checkpointing:
        counts = checkpointed(recipe, layers)
        on_gpu = on_cuda(next(model.parameters()))  # else the host's memory is what the layers compute in
        checkpoint_layers(model, *counts, offload=recipe.training.offload and on_gpu)


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
