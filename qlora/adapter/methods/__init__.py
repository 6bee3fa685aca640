"""Adapter methods by name. A new method is a file here and a line in `METHODS`."""

from qlora.adapter.methods.bitfit import BitFit
from qlora.adapter.methods.full import Full
from qlora.adapter.methods.lora import Lora
from qlora.adapter.methods.method import AdapterMethod, Method

METHODS: dict[str, Method] = {method.name: method for method in (Lora(), Full(), BitFit())}

ADAPTERS: dict[str, AdapterMethod] = {
    method.peft_type: method for method in METHODS.values() if isinstance(method, AdapterMethod)
}
"""methods that save an adapter, by peft_type, their name in adapter_config.json"""

__all__ = ["ADAPTERS", "METHODS", "AdapterMethod", "Method"]
