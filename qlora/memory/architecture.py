"""Names, shapes and counts of a model, read from its configuration: the input of forecasts."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.data import Batch
from qlora.errors import ModelError, first_line
from qlora.memory.layer_kinds import Shapes, shapes, shortened
from qlora.memory.no_forecast import failure_named, kind_of
from qlora.model.checkpointing import decoder_layers, require_layers
from qlora.model.decoder_layer import FusedLayer, Recompute, use_fused_layers
from qlora.model.document_bounds import keeps_state
from qlora.model.head import check_head_unquantized, decoder_of, head_of
from qlora.model.load import compute_dtype, embedding_is_untied, load_config, meta_model
from qlora.model.load_problems import not_causal
from qlora.model.precision import Precision, check_precision, precision_of
from qlora.model.prepare import apply_adapter
from qlora.model.prequantized import check_experts, check_quantization
from qlora.model.varlen_attention import read_documents, reads_documents
from qlora.objective.causal_lm import hidden_states
from qlora.ops.cross_entropy import tokens_at_once
from qlora.quantization.transformers_loader import as_stored, nf4_experts, nf4_layers
from qlora.recipe import Base, Checkpointing, Recipe


@dataclass(frozen=True)
class Architecture:
    """Names, shapes and counts of a model. Read once, used for many forecasts."""

    config: Any
    model: PreTrainedModel
    """on the meta device, with its adapter and our decoder layers"""
    shapes: Shapes
    """names, shapes and settings of the model and of each decoder layer"""
    padded: bool
    """True if the model also computes the padding of a batch, False if it reads the documents end to end"""
    precision: Precision
    """linear weights that loading will quantize, and the others"""

    def stored(self, base: Base) -> Base:
        """Return the `base` section with the settings of an NF4 checkpoint in place of those that it overrules."""
        return as_stored(base, self.config)

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
        layers = decoder_layers(self.model)
        if not layers or not isinstance(layers[0], FusedLayer):
            return 1.0, None
        alone = all(isinstance(layer, FusedLayer) and layer.mlp_alone for layer in layers)
        return layers[0].repeated(Recompute.ALL), layers[0].repeated(Recompute.MLP) if alone else None


def architecture(recipe: Recipe, *, cuda: bool, config: Any = None) -> Architecture:
    """Read the architecture of a recipe's base.

    Args:
        recipe: the recipe.
        cuda: True for a GPU, False for the CPU; decides the compute dtype.
        config: the base's configuration, if it is already loaded.

    Raises:
        QloraError: the base has no usable architecture, no layer to adapt, or a quantization that no run accepts.
        NoForecastError: the architecture cannot be built without weights.
    """
    config = load_config(recipe.base) if config is None else config
    check_quantization(recipe.base, config)
    with failure_named(kind_of(config)):
        return _architecture(recipe, copy.deepcopy(config), cuda)


def _architecture(recipe: Recipe, config: Any, cuda: bool) -> Architecture:
    """Build the architecture of a recipe's base from a configuration of its own."""
    model, precision, plain = _adapted(recipe, config, cuda)
    padded = not _takes_documents(recipe, config, model)
    model = use_fused_layers(model)
    if recipe.training.activation_checkpointing not in ("none", Checkpointing()):
        require_layers(model)
    return Architecture(config, model, plain.with_adapter(model), padded, precision)


def _adapted(
    recipe: Recipe, config: Any, cuda: bool, *, part: bool = False
) -> tuple[PreTrainedModel, Precision, Shapes]:
    """Return a model on the meta device with its adapter, and its precision and shapes before it had one.

    part: True if the configuration has a part of the base's layers only.
    """
    try:
        model = meta_model(recipe.base, config, dtype_on(recipe, cuda))
    except (ValueError, KeyError) as error:
        reason = not_causal(error) or first_line(error)
        raise ModelError(f"base.model: {recipe.base.model!r} cannot be built: {reason}") from error
    check_experts(recipe.base, config, model)
    in_nf4 = recipe.base.quantization == "nf4"
    stored = getattr(config, "quantization_config", None)
    quantized = frozenset((*nf4_layers(model, stored), *nf4_experts(model, stored)) if in_nf4 else ())
    check_head_unquantized(model, quantized)
    precision = precision_of(model, quantized)
    if not part:
        check_precision(recipe.base, precision)
    plain = shapes(model, config, quantized)
    apply_adapter(model, recipe, part=part)
    return model, precision, plain


def can_be_shortened(arch: Architecture, recipe: Recipe, layers: Sequence[int], *, cuda: bool) -> bool:
    """Return True if a configuration can describe a model with only some of the layers, as they are in the whole."""
    if len(layers) == arch.layers:
        return True
    try:
        model, _, plain = _adapted(recipe, shortened(arch.config, layers), cuda, part=True)
    except Exception:  # noqa: BLE001 - the model's code can fail in any way
        return False
    return plain.with_adapter(use_fused_layers(model)) == arch.shapes.of(layers)


def dtype_on(recipe: Recipe, cuda: bool) -> torch.dtype:
    """Return the recipe's compute dtype on a GPU, or on this machine's CPU."""
    return compute_dtype(recipe.base, torch.device("cuda" if cuda else "cpu"))


def _takes_documents(recipe: Recipe, config: Any, model: PreTrainedModel) -> bool:
    """Return True if a run will use our attention over documents: the model needs no other kind of attention."""
    longest = recipe.data.max_length
    if not reads_documents(model, longest) or keeps_state(model):
        return False
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    # Experts without values multiply in bfloat16 only
    few = meta_model(recipe.base, shortened(config, range(2)), torch.bfloat16)
    read_documents(few, longest)
    try:
        hidden_states(few, Batch(ids, ids, None, tokens=4, supervised=3, documents=((2, 2),)))
    except ModelError:
        return False
    except Exception:  # noqa: BLE001 - the model's code can fail in any way
        # If it fails with a mask too, the reason is that it has no values. If not, its code does not pass our
        # empty mask on to the attention but computes with it, as Nemotron's and DOGE's does
        return not _runs_with_mask(few, ids)
    return True


def _runs_with_mask(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Return True if a model without values runs on token ids [1, T] with transformers' attention and a mask."""
    length = ids.shape[1]
    model.set_attn_implementation("sdpa")
    mask = torch.zeros(1, 1, length, length, dtype=torch.bfloat16, device=ids.device)
    positions = torch.arange(length, device=ids.device)[None]
    try:
        decoder_of(model)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    except Exception:  # noqa: BLE001 - the model's code can fail in any way
        return False
    return True
