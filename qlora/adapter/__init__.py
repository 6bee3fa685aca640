"""LoRA adapters: the layers, where they go, and the folders they are kept in."""

from qlora.adapter.lora import LoRALinear, adapt, lora_layers, lora_parameter_count, trainable_parameters
from qlora.adapter.store import load_adapter, save_adapter
from qlora.adapter.targets import select

__all__ = [
    "LoRALinear",
    "adapt",
    "load_adapter",
    "lora_layers",
    "lora_parameter_count",
    "save_adapter",
    "select",
    "trainable_parameters",
]
