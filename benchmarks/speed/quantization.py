"""Settings with which bitsandbytes quantizes the base for all contenders."""

import torch
from transformers import BitsAndBytesConfig


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return NF4 with double quantization, with matrix products in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
