"""Bases whose checkpoint is in NF4 already: checks, and what is known of their experts before they are read.

transformers 5   quantizes the linear layers and leaves the experts in 16 bits; loading quantizes these
transformers 4   had a linear layer for each matrix of an expert; loading takes their codes and statistics as they are
"""

import re
from typing import Any

from transformers import PreTrainedModel

from qlora.errors import ModelError
from qlora.model.base_files import packed_expert
from qlora.model.locate import locate
from qlora.quantization.expert_stack import LIKE_THE_INTERFACE
from qlora.quantization.mxfp4 import read_as_16_bits
from qlora.quantization.nf4_checkpoint import experts_in_16_bits
from qlora.quantization.transformers_loader import nf4_experts, require_nf4
from qlora.recipe import Base
from qlora.storage.safetensors_files import ShardReader, find_checkpoint

EACH = re.compile(r"\.experts\.\d+\.\w+\.weight$")
"""name of a matrix of one expert"""


def format_remembered(base: Base, config: Any) -> Any:
    """Return a configuration that knows how the files of its base have the experts, in MXFP4 or in NF4."""
    config = read_as_16_bits(config)
    if getattr(config, "quantization_config", None) is not None:
        config.packed_expert = packed_expert(locate(base), base.revision or "main")
    return config


def has_packed_experts(config: Any) -> bool:
    """Return True if the files have experts in NF4, gate and up apart; False also if no files are here."""
    return getattr(config, "packed_expert", None) is not None


def check_quantization(base: Base, config: Any) -> None:
    """Check that the recipe can use the checkpoint's own quantization, if it has one; see `require_nf4`.

    Raises:
        ModelError: it is not NF4, or its experts are in a form of NF4 that cannot be read.
        RecipeError: the recipe sets another quantization.
    """
    if (stored := getattr(config, "quantization_config", None)) is None:
        return
    require_nf4(base, stored)
    if has_packed_experts(config) and not EACH.search(config.packed_expert):
        raise ModelError(
            f"base.model: {base.model!r} has experts in a form of 4 bits that qlora does not read "
            f"({config.packed_expert}); it reads a matrix for each expert, as transformers 4 wrote them. Use the "
            "16-bit version of the model; loading quantizes the experts too"
        )


def check_experts(base: Base, config: Any, model: PreTrainedModel) -> None:
    """Check that experts that the files have in NF4 have a place in `model`. Raises ModelError if they do not."""
    own_form = any(type(module).__name__ in LIKE_THE_INTERFACE for module in model.modules())
    if not has_packed_experts(config) or (nf4_experts(model, config.quantization_config) and not own_form):
        return
    if nf4_experts(model) and not own_form:
        raise ModelError(
            f"base.model: llm_int8_skip_modules in config.json of {base.model!r} leaves out the experts, and the files "
            f"have them in 4 bits ({config.packed_expert}). Remove the experts from that list"
        )
    raise ModelError(
        f"base.model: {base.model!r} has experts in 4 bits ({config.packed_expert}), and qlora does not read "
        f"these for {type(model).__name__}. Use the 16-bit version of the model, with its experts in 16 bits"
    )


def quantized_on_reading(base: Base, config: Any, model: PreTrainedModel) -> list[str]:
    """Return the names of tensors that hold experts in 16 bits, in a checkpoint that is in NF4 and on this machine.

    model: the unquantized model on the meta device.
    """
    stored = getattr(config, "quantization_config", None)
    if base.init != "pretrained" or stored is None or not nf4_experts(model, stored):
        return []
    try:
        reader = ShardReader(find_checkpoint(locate(base), base.revision or "main"))
    except (ModelError, OSError, ValueError):
        return []  # loading says what is wrong with it
    return experts_in_16_bits(model, stored, reader)
