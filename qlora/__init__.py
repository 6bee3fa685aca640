"""qlora: fine-tune 7B-65B language models on one GPU from a recipe.

The names below are the Python API; each is imported when it is first used, so `import qlora` costs nothing.

    >>> import qlora
    >>> recipe = qlora.Recipe.load("quickstart", ["training.max_steps=20"])
    >>> outcome = qlora.train(recipe)
    >>> outcome.loss_before, outcome.loss_after
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.adapter.lora import LoRALinear as LoRALinear
    from qlora.adapter.lora import adapt as adapt
    from qlora.adapter.lora import lora_layers as lora_layers
    from qlora.adapter.lora import trainable_parameters as trainable_parameters
    from qlora.adapter.store import load_adapter as load_adapter
    from qlora.adapter.store import save_adapter as save_adapter
    from qlora.adapter.switch import Adapters as Adapters
    from qlora.base import load_base as load_base
    from qlora.base import load_tokenizer as load_tokenizer
    from qlora.data import load_dataset as load_dataset
    from qlora.errors import QloraError as QloraError
    from qlora.generate import answer as answer
    from qlora.merging import merge as merge
    from qlora.recipe import Recipe as Recipe
    from qlora.train import train as train

_HOME = {
    "Adapters": "qlora.adapter.switch",
    "LoRALinear": "qlora.adapter.lora",
    "QloraError": "qlora.errors",
    "Recipe": "qlora.recipe",
    "adapt": "qlora.adapter.lora",
    "answer": "qlora.generate",
    "load_adapter": "qlora.adapter.store",
    "load_base": "qlora.base",
    "load_dataset": "qlora.data",
    "load_tokenizer": "qlora.base",
    "lora_layers": "qlora.adapter.lora",
    "merge": "qlora.merging",
    "save_adapter": "qlora.adapter.store",
    "train": "qlora.train",
    "trainable_parameters": "qlora.adapter.lora",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


class _Package(ModuleType):
    """Importing `qlora.train`, the file, would put it in the place of `qlora.train`, the function: not here."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return __all__
