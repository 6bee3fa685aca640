"""Adapters that PEFT drops when it loads them, because it takes a dense MLP for experts.

For these mixtures PEFT 0.21 moves the tensors of gate_proj, up_proj and down_proj to the experts' three-dimensional
parameters, also those of dense layers and of shared experts, and drops them with a warning
(`convert_peft_config_for_transformers`).
"""

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.lora_experts import LoRAExperts
from qlora.errors import listed

LAYERS = ("gate_proj", "up_proj", "down_proj")

MODEL_TYPES = frozenset([
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "solar_open",
])  # fmt: skip
"""model types that PEFT 0.21 treats like Qwen 2's mixture, without its names for dense MLPs"""


def peft_drops(model: nn.Module) -> list[str]:
    """Return a remark that names the adapted layers that PEFT drops; empty if it loads all of them."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in MODEL_TYPES:
        return []
    layers = AdaptedLayer.of(model).items()
    names = [
        name
        for name, layer in layers
        if name.rpartition(".")[2] in LAYERS and not isinstance(layer, LoRAExperts)
    ]
    if not names:
        return []
    return [
        f"PEFT 0.21 drops the adapters of {listed(names)} when it loads this adapter, because it takes them for those "
        "of experts. qlora loads and merges all of them; merge the adapter for other programs"
    ]
