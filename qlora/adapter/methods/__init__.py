"""Adapter methods by name. A new method is a file here and a line in `METHODS`."""

from qlora.adapter.methods.adalora import Adalora
from qlora.adapter.methods.bitfit import BitFit
from qlora.adapter.methods.course import Course
from qlora.adapter.methods.dora import Dora
from qlora.adapter.methods.full import Full
from qlora.adapter.methods.lora import Lora
from qlora.adapter.methods.method import AdapterMethod, Method
from qlora.adapter.methods.vera import Vera

# DoRA before LoRA, whose config it extends: the first method that claims a config reads it
METHODS: dict[str, Method] = {
    method.name: method for method in (Dora(), Lora(), Adalora(), Vera(), Full(), BitFit())
}

ADAPTERS = [method for method in METHODS.values() if isinstance(method, AdapterMethod)]
"""methods that save an adapter"""

__all__ = ["ADAPTERS", "METHODS", "AdapterMethod", "Course", "Method"]
