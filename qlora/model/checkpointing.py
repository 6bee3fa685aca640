"""Which layers keep their activations and which compute them again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.errors import RecipeError
from qlora.model.decoder_layer import FusedLayer, Recompute
from qlora.model.offload import ActivationOffloader
from qlora.ops.dropout import with_these_rows


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer | FusedLayer]:
    """The model's layers that can be checkpointed, from the first to the last."""
    kinds = (GradientCheckpointingLayer, FusedLayer)
    return [module for module in model.modules() if isinstance(module, kinds)]


def checkpoint_layers(
    model: nn.Module, layers: int | None = None, mlps: int = 0, *, offload: bool = False
) -> None:
    """Recompute the activations of the first `layers` decoder layers (None: of all) in the backward pass.

    Of the `mlps` layers after those, the MLP alone is recomputed. Non-reentrant, so frozen embeddings need no
    artificial gradient, and with the random state kept, so dropout draws the same mask twice. `offload`: what these
    layers keep, their inputs, lies in host memory meanwhile.
    """
    found = decoder_layers(model)
    if not found:
        raise RecipeError(
            f"{type(model).__name__} has no layers that can be checkpointed: "
            "set training.activation_checkpointing=none"
        )
    count = len(found) if layers is None else min(layers, len(found))
    plain = ActivationOffloader().checkpoint if offload else partial(checkpoint, use_reentrant=False)

    def kept_by(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(with_these_rows(layer), *args, **kwargs)

    for index, layer in enumerate(found):
        alone = count <= index < count + mlps
        if isinstance(layer, FusedLayer):
            layer.recompute = (
                Recompute.ALL if index < count else Recompute.MLP if alone else Recompute.NOTHING
            )
            layer.checkpoint = kept_by
            continue
        if alone:
            raise RecipeError(
                f"{type(model).__name__} has no layers of ours, whose MLP can be recomputed alone: "
                "set training.activation_checkpointing=full, or none"
            )
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = kept_by
