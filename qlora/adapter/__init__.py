"""Adapters: trainable layers around frozen linears, the choice of target layers, and adapter folders on disk."""

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.lora import LoRALinear, adapt, lora_layers, lora_parameter_count
from qlora.adapter.store import load_adapter, save_adapter
from qlora.adapter.switch import Adapters
from qlora.adapter.targets import select

__all__ = [
    "Adapters",
    "LoRALinear",
    "LoraSpec",
    "adapt",
    "load_adapter",
    "lora_layers",
    "lora_parameter_count",
    "save_adapter",
    "select",
    "trainable_parameters",
]
