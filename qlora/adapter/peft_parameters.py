"""Linear layers whose weights PEFT's config names as parameters, so that PEFT does not take them for experts.

For the mixtures below PEFT 0.21 changes the config of a LoRA as it loads it (`convert_peft_config_for_transformers`).
It takes gate_proj, up_proj and down_proj in `target_modules` for experts, also where they are dense layers or shared
experts. It drops their tensors and doubles the alpha of the experts' gate_up_proj, without a word if the adapter has
experts. As an entry of `target_parameters`, such as `mlp.gate_proj.weight`, a layer keeps its tensors and their names.
"""

from collections.abc import Collection, Iterable
from typing import Any

from qlora.adapter.peft_experts import is_projection

LAYERS = ("gate_proj", "up_proj", "down_proj")

MODEL_TYPES = frozenset([
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
])  # fmt: skip
"""model types that PEFT 0.21 treats like Qwen 2's mixture, without its names for dense MLPs"""


def taken_for_experts(model: Any, layers: Iterable[str]) -> list[str]:
    """Return those of the names of linear layers that PEFT takes for experts of `model`."""
    if getattr(getattr(model, "config", None), "model_type", None) not in MODEL_TYPES:
        return []
    return [name for name in layers if name.rpartition(".")[2] in LAYERS]


def parameter_of(layer: str) -> str:
    """Return the name of a linear layer's weight."""
    return f"{layer}.weight"


def is_parameter(layer: str, targets: Collection[str]) -> bool:
    """Return True if `targets`, the config's `target_parameters`, match the weight of a linear layer."""
    name = parameter_of(layer)
    matches = any(name == entry or name.endswith(f".{entry}") for entry in targets)
    return matches and not is_projection(layer, targets)


def key_of(layer: str, targets: Collection[str]) -> str:
    """Return the name that PEFT's rank_pattern and alpha_pattern have for a layer: its weight's for a parameter."""
    return parameter_of(layer) if is_parameter(layer, targets) else layer
