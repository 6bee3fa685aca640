"""Shape of a model's key-value cache, and the attention masks of its layers, as far as requests can share a batch."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora.errors import first_line
from qlora.runtime.out_of_memory import is_out_of_memory

_PROBE = 3
"""tokens of the pass that shows the shapes"""

_OTHER_WINDOWS = ("window_size", "attention_window_size", "attention_chunk_size")
"""windows of attention that models apply in code of their own, such as GPT-Neo's, and not through the mask"""


class CannotBatch(Exception):
    """Requests to this model cannot share a batch; the text says why."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of the keys and values of one layer, for one token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(frozen=True)
class KVLayout:
    """Key-value cache of a model: its layers, and which of the earlier tokens they attend to."""

    layers: tuple[LayerShape, ...]
    window: int | None
    """tokens that a sliding layer attends to, its own included; None if each layer attends to all"""
    by_type: bool
    """True if the model takes a mask for each type of layer, False if one mask for all"""
    cache_keyword: str
    """name of the model's argument for the cache"""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    def bytes(self, slots: int, context: int) -> int:
        """Return the bytes of a cache with `slots` slots of `context` tokens, and of one gathered layer of it."""
        widest = max(layer.token_bytes for layer in self.layers)
        return slots * context * (self.token_bytes + widest)

    def masks(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Return additive attention masks [B, 1, T, `length`] for queries at `positions` [B, T]."""
        keys = torch.arange(length, device=positions.device)
        queries = positions[:, None, :, None]  # [B, 1, T, 1]
        causal = keys <= queries
        if self.window is None:
            return self._additive(causal)
        sliding = causal & (keys > queries - self.window)
        if not self.by_type:
            return self._additive(sliding)
        return {"full_attention": self._additive(causal), "sliding_attention": self._additive(sliding)}

    def _additive(self, allowed: Tensor) -> Tensor:
        dtype = self.layers[0].dtype
        blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
        return torch.where(allowed, torch.zeros_like(blocked), blocked)


@torch.no_grad()
def read_layout(model: nn.Module, context: int) -> KVLayout:
    """Learn the layout of `model`'s cache from a short forward pass; the model is in evaluation mode.

    Raises:
        CannotBatch: the cache is not one of keys and values alone; or the results of one request would depend on the
            lengths of others, at up to `context` tokens.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    _check_rotation(config, context)
    for name in _OTHER_WINDOWS:
        if (other := getattr(config, name, None)) and other < context:
            raise CannotBatch(
                f"its {name} of {other:,} tokens is applied by its own code; --context {other} allows batches"
            )
    arguments = inspect.signature(model.forward).parameters
    keyword = next((name for name in ("cache", "past_key_values") if name in arguments), None)
    if keyword is None or "position_ids" not in arguments:
        raise CannotBatch(f"{type(model).__name__} takes no positions or no cache from its caller")
    cache: Any = DynamicCache(config=model.config)
    device = next(model.parameters()).device
    ids = torch.arange(1, 1 + _PROBE, device=device)[None]
    try:
        model(input_ids=ids, use_cache=True, **{keyword: cache})
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CannotBatch(f"its cache cannot be read ({first_line(error)})") from error
    shapes = tuple(_shape(layer) for layer in cache.layers)
    if not shapes:
        raise CannotBatch("it keeps its state elsewhere than in a cache of keys and values")
    types = set(getattr(config, "layer_types", None) or ())
    if types - {"full_attention", "sliding_attention"}:
        raise CannotBatch(f"it has layers of type {', '.join(sorted(types))}")
    sliding = not types or "sliding_attention" in types
    window = getattr(config, "sliding_window", None) if sliding else None
    window = None if window is None or window >= context else window
    return KVLayout(shapes, window, bool(types), keyword)


def _shape(layer: Any) -> LayerShape:
    """Return the shape of a layer of transformers' cache. Raises CannotBatch if it holds more than keys and values."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CannotBatch(f"its cache has a {type(layer).__name__}, not keys and values alone")
    keys, values = layer.keys, layer.values
    if keys is None or keys.ndim != 4 or keys.shape[:1] + keys.shape[2:3] != (1, _PROBE):
        raise CannotBatch("its cache is not one row of keys and values for each token")
    if keys.dtype != values.dtype or keys.shape[1] != values.shape[1]:
        raise CannotBatch("its keys and values differ in type or heads")
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


def _check_rotation(config: Any, context: int) -> None:
    """Raise CannotBatch if the rotation of positions depends on the longest request of a batch."""
    rotation = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rotation.values() if isinstance(value, dict)]
    for each in nested or [rotation]:
        before = each.get("original_max_position_embeddings") or config.max_position_embeddings
        if each.get("rope_type") in ("dynamic", "longrope") and context > before:
            raise CannotBatch(
                f"its positions ({each['rope_type']}) depend on the longest request above {before:,} tokens; "
                f"--context {before} allows batches"
            )
