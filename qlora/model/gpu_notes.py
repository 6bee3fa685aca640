"""Remarks on what a GPU lacks for a recipe, said once before a run: bfloat16, flash attention, paged memory."""

from collections.abc import Iterator
from typing import Any

import torch

from qlora.model.load import compute_dtype
from qlora.model.varlen_attention import flash_obstacle
from qlora.optim.methods import METHODS
from qlora.recipe import Recipe
from qlora.runtime import gpu


def gpu_notes(recipe: Recipe, config: Any, device: torch.device) -> list[str]:
    """Return the remarks on `device` for a recipe and its base's transformers configuration; none for a CPU."""
    if device.type != "cuda":
        return []
    dtype = compute_dtype(recipe.base, device)
    return [*_dtype(recipe, device, dtype), *_attention(config, device, dtype), *_paging(recipe, device)]


def _dtype(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    if gpu.has_bfloat16(device):
        return
    major, minor = gpu.capability(device)
    reason = f"this GPU has compute capability {major}.{minor}, and bfloat16 in hardware begins with 8.0"
    if dtype == torch.bfloat16:
        yield f"base.compute_dtype: bfloat16 is emulated, which is slow: {reason}. float32 needs more memory"
    elif recipe.base.compute_dtype == "auto":
        yield f"base.compute_dtype: auto is float32, which takes twice the memory of bfloat16 for activations: {reason}"


def _attention(config: Any, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    found = (flash_obstacle(gpu.capability(device), dtype, *widths) for widths in head_widths(config))
    if (obstacle := next(filter(None, found), None)) is not None:
        yield f"attention runs document by document, which is slower than flash attention for all: {obstacle}"


def _paging(recipe: Recipe, device: torch.device) -> Iterator[str]:
    name = recipe.optimizer.name
    if METHODS[name].paged and not gpu.can_page(device):
        yield (
            f"optimizer.name: {name} is not paged, because the driver cannot move memory of this GPU to the host (as "
            "in WSL and on many virtual GPUs): its state takes ordinary memory, which the forecast counts"
        )


def head_widths(config: Any) -> list[tuple[int, int]]:
    """Return the features of a head in queries (and keys) and in values, of each kind of layer in the configuration."""
    text = config.get_text_config()
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    return list(dict.fromkeys(filter(None, map(_widths, layers))))


def _widths(layer: Any) -> tuple[int, int] | None:
    """Return the features of a head in one layer; None if its configuration does not say."""
    heads, hidden = getattr(layer, "num_attention_heads", None), getattr(layer, "hidden_size", None)
    nope, rope = getattr(layer, "qk_nope_head_dim", None), getattr(layer, "qk_rope_head_dim", None)
    if isinstance(nope, int) and isinstance(rope, int):  # multi-head latent attention
        return nope + rope, getattr(layer, "v_head_dim", None) or nope
    width = getattr(layer, "head_dim", None)
    if width is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        width = hidden // heads
    return (width, width) if isinstance(width, int) else None
