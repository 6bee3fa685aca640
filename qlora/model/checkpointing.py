"""Activation checkpointing: the choice of layers that recompute their activations in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.errors import RecipeError
from qlora.model.decoder_layer import FusedLayer, Recompute, why_mlp_not_alone
from qlora.model.head import decoder_of
from qlora.model.offload import ActivationOffloader
from qlora.model.router_loss import keep_routing
from qlora.ops.dropout import keep_row_positions


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer | FusedLayer]:
    """Return the layers of the text model that can be checkpointed, from first to last.

    A model that also reads images or audio has further layers, which see no text.
    """
    kinds = (GradientCheckpointingLayer, FusedLayer)
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else model
    return [module for module in decoder.modules() if isinstance(module, kinds)]


def require_layers(model: nn.Module) -> None:
    """Raise RecipeError if the model has no layers that can be checkpointed, such as CTRL and the first GPT."""
    if not decoder_layers(model):
        raise RecipeError(
            f"training.activation_checkpointing: {type(model).__name__} has no layers that can be checkpointed. "
            "Set training.activation_checkpointing=none"
        )


def checkpoint_layers(
    model: nn.Module, layers: int | None = None, mlps: int = 0, *, offload: bool = False
) -> None:
    """Recompute the activations of the first decoder layers in the backward pass.

    Checkpointing is non-reentrant, so frozen embeddings need no artificial gradient. It restores the random state, so
    dropout draws the same mask twice.

    Args:
        model: the model; its layers are changed in place.
        layers: number of layers that are recomputed as a whole; None means all.
        mlps: number of layers after these that recompute only their MLP.
        offload: keep the inputs of the layers that are recomputed as a whole in host memory between the passes.

    Raises:
        RecipeError: the model has no layers that can be checkpointed, or no fused layers whose MLP can be.
    """
    decoder = decoder_layers(model)
    require_layers(model)
    count = len(decoder) if layers is None else min(layers, len(decoder))
    plain = ActivationOffloader().checkpoint if offload else partial(checkpoint, use_reentrant=False)

    def checkpointed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(keep_routing(keep_row_positions(layer)), *args, **kwargs)

    for index, layer in enumerate(decoder):
        mlp_only = count <= index < count + mlps
        if mlp_only and not (isinstance(layer, FusedLayer) and layer.mlp_alone):
            raise RecipeError(
                f"{why_mlp_not_alone(model, layer)}, so its MLPs cannot be recomputed alone: "
                "set training.activation_checkpointing=full, or none"
            )
        if isinstance(layer, FusedLayer):
            layer.recompute = (
                Recompute.ALL if index < count else Recompute.MLP if mlp_only else Recompute.NOTHING
            )
            layer.checkpoint = checkpointed
            continue
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = checkpointed
