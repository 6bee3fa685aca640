"""LoRA adapters: the layers, where they go, and the folders they are kept in."""

from qlora.adapter.merge import merged_weight
from qlora.adapter.methods.lora import (
    LoRALinear,
    adapt,
    lora_layers,
    lora_parameter_count,
    trainable_parameters,
)
from qlora.adapter.store import load_adapter, save_adapter
from qlora.adapter.switch import Adapters
from qlora.adapter.targets import select

__all__ = [
    "Adapters",
    "LoRALinear",
    "adapt",
    "load_adapter",
    "lora_layers",
    "lora_parameter_count",
    "merged_weight",
    "save_adapter",
    "select",
    "trainable_parameters",
]
