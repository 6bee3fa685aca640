"""What an adapter method is: the seam that LoRA, BitFit and full fine-tuning come through.

A method is one file in this folder, a line in its `METHODS` and in that of `qlora.recipe.methods`, its name in the
schema, and its test. Training, forecast, storage, merging and chat ask the method, never for its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.identity import BaseIdentity
from qlora.recipe import Adapter


class Method(ABC):
    """A way to fine-tune."""

    name: ClassVar[str]
    """in a recipe: `adapter.method`"""

    @abstractmethod
    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze what is not trained and put into `model` what is, in place; return the model.

        settings: the recipe's `adapter` section. seed: of what is drawn. Raises ModelError if the model lacks what they
        name.
        """

    def notes(self, model: nn.Module) -> list[str]:
        """What a user should know of how the method fits this adapted model."""
        return []


class AdapterMethod(Method):
    """A method that leaves the base as it is, and saves what it trains beside it as an adapter."""

    peft_type: ClassVar[str]
    """in adapter_config.json"""
    layer: ClassVar[type[AdaptedLinear]]

    @abstractmethod
    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Fields of adapter_config.json for these layers of `model`. Raises ModelError for what it cannot say."""

    @abstractmethod
    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if `config`, read from `file`, asks for something unknown here."""

    @abstractmethod
    def targets(
        self, model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], file: Path
    ) -> list[str]:
        """Names of the layers of `model` that `config` adapts, given the layers that the file has tensors for."""

    @abstractmethod
    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> Any:
        """Settings of the layer `name`; `layer(linear, spec)` makes one to read tensors into."""
