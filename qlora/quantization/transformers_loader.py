"""Adds our block size to transformers' bitsandbytes loader, and checks and corrects the loaded model."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora.errors import ModelError, RecipeError
from qlora.quantization import nf4
from qlora.recipe import Base
from qlora.runtime.patches import quantizer_replaced


def nf4_config(base: Base, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration for the recipe's NF4 base, with compute dtype `dtype`.

    `from_pretrained` uses its block size only within `block_size_applied`.
    """
    return _BlockSizedNF4Config(
        block_size=base.block_size,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def block_size_applied() -> AbstractContextManager[None]:
    """Return a context in which `from_pretrained` quantizes with the block size of an `nf4_config`."""
    return quantizer_replaced("bitsandbytes_4bit", _BlockSizedNF4Quantizer)


def require_nf4(base: Base, config: Any) -> None:
    """Check that an already quantized checkpoint is NF4, and that the recipe asks for NF4.

    Args:
        base: the recipe's `base` section.
        config: the checkpoint's own quantization config.

    Raises:
        ModelError: The checkpoint is not quantized to NF4 by bitsandbytes.
        RecipeError: The recipe sets another quantization.
    """
    settings = config if isinstance(config, dict) else config.to_dict()
    method = settings.get("quant_method", "unknown")
    kind = settings.get("bnb_4bit_quant_type")
    if not (str(method).endswith("bitsandbytes") and settings.get("load_in_4bit") and kind == "nf4"):
        raise ModelError(
            f"base.model: {base.model!r} is already quantized by {method} ({kind or 'not NF4'}). "
            "Use its 16-bit version, or a version quantized to NF4 by bitsandbytes"
        )
    if base.quantization != "nf4":
        raise RecipeError(f"base.model: {base.model!r} is an NF4 checkpoint; set base.quantization=nf4")


def cast_dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the unquantized weights of an NF4 checkpoint to `dtype`, in place.

    transformers 5.23 leaves them in the file's dtype, so the dtypes of head and norms differ from the rest.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


class _BlockSizedNF4Config(BitsAndBytesConfig):
    """bitsandbytes' configuration with a block size, which transformers fixes at bitsandbytes' default of 64."""

    def __init__(self, block_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size


class _BlockSizedNF4Quantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit loader that sets the block size of each weight before quantization."""

    def _process_model_before_weight_loading(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        block_size = getattr(self.quantization_config, "block_size", 64)
        for module in model.modules():
            if nf4.is_nf4(module):
                module.weight.blocksize = block_size
