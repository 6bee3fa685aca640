"""Remarks on the files of a base, from their headers: what is not used, and what is quantized as it is read."""

from typing import Any

import torch

from qlora.model.load import meta_model
from qlora.model.prequantized import has_packed_experts, quantized_on_reading
from qlora.model.unused_tensors import unused_notes
from qlora.quantization.transformers_loader import as_stored
from qlora.recipe import Base


def checkpoint_notes(base: Base, config: Any) -> list[str]:
    """Return the remarks on the checkpoint of a recipe's base; `config` is its transformers configuration."""
    return [*quantized_notes(base, config), *unused_notes(base, config)]


def quantized_notes(base: Base, config: Any) -> list[str]:
    """Return the remark that loading quantizes experts that an NF4 checkpoint has in 16 bits, if it does."""
    if getattr(config, "quantization_config", None) is None:
        return []
    names = quantized_on_reading(base, config, meta_model(base, config, torch.bfloat16))
    if not names:
        return []
    settings = as_stored(base, config)
    double = " with double quantization" * settings.double_quant
    which = f"{len(names):,} matrices of experts" if has_packed_experts(config) else "the experts"
    return [
        f"base.model: {which} in this NF4 checkpoint are in 16 bits; a run quantizes them to NF4 as it reads them, in "
        f"blocks of {settings.block_size}{double}. llm_int8_skip_modules in its config.json can list what is to stay "
        "in 16 bits, beside the head"
    ]
