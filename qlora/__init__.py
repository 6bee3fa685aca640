"""qlora: fine-tune 7B-65B language models on one GPU from a recipe.

The names below are the Python API. Each is imported at its first use, so `import qlora` is fast.

Example:
    >>> import qlora
    >>> recipe = qlora.Recipe.load("quickstart", ["training.max_steps=100"])
    >>> outcome = qlora.train(recipe)
    >>> outcome.loss_before, outcome.loss_after
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.adapter.adapted_linear import trainable_parameters as trainable_parameters
    from qlora.adapter.lora_spec import LoraSpec as LoraSpec
    from qlora.adapter.merge import merge_adapter as merge_adapter
    from qlora.adapter.methods.lora import LoRALinear as LoRALinear
    from qlora.adapter.methods.lora import adapt as adapt
    from qlora.adapter.methods.lora import lora_layers as lora_layers
    from qlora.adapter.store import load_adapter as load_adapter
    from qlora.adapter.store import save_adapter as save_adapter
    from qlora.adapter.switch import Adapters as Adapters
    from qlora.data import load_dataset as load_dataset
    from qlora.errors import QloraError as QloraError
    from qlora.inference.generate import answer as answer
    from qlora.merging.merge import merge as merge
    from qlora.model.load import load_base as load_base
    from qlora.model.load import load_tokenizer as load_tokenizer
    from qlora.recipe import Recipe as Recipe
    from qlora.training.train import train as train

_HOME = {
    "Adapters": "qlora.adapter.switch",
    "LoRALinear": "qlora.adapter.methods.lora",
    "LoraSpec": "qlora.adapter.lora_spec",
    "QloraError": "qlora.errors",
    "Recipe": "qlora.recipe",
    "adapt": "qlora.adapter.methods.lora",
    "answer": "qlora.inference.generate",
    "load_adapter": "qlora.adapter.store",
    "load_base": "qlora.model.load",
    "load_dataset": "qlora.data",
    "load_tokenizer": "qlora.model.load",
    "lora_layers": "qlora.adapter.methods.lora",
    "merge": "qlora.merging.merge",
    "merge_adapter": "qlora.adapter.merge",
    "save_adapter": "qlora.adapter.store",
    "train": "qlora.training.train",
    "trainable_parameters": "qlora.adapter.adapted_linear",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
