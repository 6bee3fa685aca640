"""Checkpoints whose experts are in MXFP4, as those of gpt-oss: read as 16-bit numbers, one projection at a time.

MXFP4 has 4-bit floats in blocks of 32 with a power of two each (OCP Microscaling Formats 1.0, 2023). A run dequantizes
a projection of a layer when it reads it, and quantizes it to NF4 before it reads the next one.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter
from transformers.integrations.mxfp4 import Mxfp4Dequantize, convert_moe_packed_tensors

from qlora.quantization.expert_stack import PROJECTIONS

MODEL_TYPES = ("gpt_oss",)
"""model types whose tensors in MXFP4 are known here"""

BLOCKS, SCALES = "_blocks", "_scales"
"""ends of the names of a projection's tensors: 4-bit numbers, two to a byte, and exponents"""


def read_as_16_bits(config: Any) -> Any:
    """Return the configuration of a checkpoint; one in MXFP4 becomes that of a 16-bit checkpoint, and remembers it."""
    stored = getattr(config, "quantization_config", None)
    settings = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    method = None if settings is None else settings.get("quant_method")
    if method == "mxfp4" and config.model_type in MODEL_TYPES:
        del config.quantization_config
        config.stored_in_mxfp4 = True
    return config


def is_mxfp4(config: Any) -> bool:
    """Return True if `read_as_16_bits` found a checkpoint in MXFP4."""
    return bool(getattr(config, "stored_in_mxfp4", False))


def is_packed(name: str) -> bool:
    """Return True if this is the name of a projection's 4-bit numbers or exponents in a checkpoint's files."""
    return name.endswith(tuple(own + part for own in PROJECTIONS for part in (BLOCKS, SCALES)))


def parameter_of(name: str) -> str:
    """Return the name of the parameter that a tensor in MXFP4 is part of, for a name that `is_packed`."""
    return name.removesuffix(BLOCKS).removesuffix(SCALES)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return matrices [E, in, out] in bfloat16, which holds every number of MXFP4.

    Args:
        blocks: two 4-bit numbers a byte [E, out, in / 32, 16].
        scales: exponents plus 127 [E, out, in / 32].
    """
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()


def conversions(quantizer: Any = None) -> list[WeightConverter]:
    """Return transformers' conversions of the tensors in MXFP4 into 16-bit parameters; `quantizer` is the caller."""
    return [
        WeightConverter([name + BLOCKS, name + SCALES], name, [Mxfp4Dequantize(quantizer)])
        for name in PROJECTIONS
        if name != "up_proj"
    ]
