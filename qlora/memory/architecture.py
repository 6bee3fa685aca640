"""Names, shapes and counts of a model, read from its configuration: the input of forecasts."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.data import Batch
from qlora.errors import ModelError
from qlora.model.checkpointing import decoder_layers
from qlora.model.decoder_layer import FusedLayer, Recompute, use_fused_layers
from qlora.model.head import head_of
from qlora.model.load import compute_dtype, embedding_is_untied, load_config, meta_model
from qlora.model.prepare import apply_adapter
from qlora.model.varlen_attention import read_documents, reads_documents
from qlora.objective.causal_lm import hidden_states
from qlora.ops.cross_entropy import tokens_at_once
from qlora.recipe import Recipe


@dataclass(frozen=True)
class Architecture:
    """Names, shapes and counts of a model. Read once, used for many forecasts."""

    config: Any
    model: PreTrainedModel
    """on the meta device, with its adapter and our decoder layers"""
    layers_equal: bool
    """True if all decoder layers have the same parameters and the same attention"""
    padded: bool
    """True if the model also computes the padding of a batch, False if it reads the documents end to end"""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(decoder_layers(self.model))

    def loss_chunk(self, recipe: Recipe) -> int:
        """Return how many trained tokens the head processes at a time."""
        return recipe.training.loss_chunk or tokens_at_once(len(head_of(self.model).weight))

    @property
    def embedding_is_untied(self) -> bool:
        """True if the input embedding is a plain embedding and shares no weights with the output head."""
        return embedding_is_untied(self.model)

    @property
    def recomputed(self) -> tuple[float, float | None]:
        """Share of a layer's forward products that recomputation repeats: of the whole layer, and of its MLP alone.

        The second is None if the MLP cannot be recomputed alone.
        """
        layer = next(iter(decoder_layers(self.model)), None)
        if not isinstance(layer, FusedLayer):
            return 1.0, None
        return layer.repeated(Recompute.ALL), layer.repeated(Recompute.MLP)


def architecture(recipe: Recipe, *, cuda: bool, config: Any = None) -> Architecture:
    """Read the architecture of a recipe's base.

    Args:
        recipe: the recipe.
        cuda: True for a GPU, False for the CPU; decides the compute dtype.
        config: the base's configuration, if it is already loaded.

    Raises:
        QloraError: the base has no usable architecture, or no layer to adapt.
    """
    config = load_config(recipe.base) if config is None else config
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a checkpoint quantized elsewhere has the same shapes
    try:
        model = meta_model(recipe.base, config, dtype_on(recipe, cuda))
    except (ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"base.model: {recipe.base.model!r} cannot be built: {reason}") from error
    apply_adapter(model, recipe)
    padded = not _takes_documents(recipe, config, model)
    return Architecture(config, use_fused_layers(model), _alike(model, config), padded)


def shortened(config: Any, layers: int) -> Any:
    """Return a copy of the configuration with only its first `layers` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers < getattr(text, "num_hidden_layers", 0):
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def dtype_on(recipe: Recipe, cuda: bool) -> torch.dtype:
    """Return the recipe's compute dtype on a GPU, or on this machine's CPU."""
    return compute_dtype(recipe.base, torch.device("cuda" if cuda else "cpu"))


def _takes_documents(recipe: Recipe, config: Any, model: PreTrainedModel) -> bool:
    """Return True if a run will use our attention over documents: the model needs no other kind of attention."""
    if not reads_documents(model):
        return False
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        few = meta_model(recipe.base, shortened(config, 2), model.dtype)
        read_documents(few)
        hidden_states(few, Batch(ids, ids, None, tokens=4, supervised=3, documents=((2, 2),)))
    except ModelError:
        return False
    except Exception:  # noqa: BLE001 - a model can fail for other reasons: it has no values
        pass
    return True


def _alike(model: nn.Module, config: Any) -> bool:
    """Return True if all decoder layers are alike, adapters included."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    layers = decoder_layers(model)
    looks = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        for layer in layers
    }
    return len(set(kinds)) <= 1 and len(looks) == 1
