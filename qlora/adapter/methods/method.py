"""Interface of the adapter methods.

A method is one file in this folder, a line in `METHODS` here and in `qlora.recipe.methods`, its name in the
schema, and its test. Training, forecast, storage, merging and chat call this interface and never check the name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer, layer_class
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import InitialValues
from qlora.adapter.methods.course import Course
from qlora.errors import ModelError
from qlora.recipe import Adapter


class Method(ABC):
    """A fine-tuning method."""

    name: ClassVar[str]
    """name in a recipe, `adapter.method`"""

    @abstractmethod
    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze the weights that are not trained and add what is trained to `model`, in place.

        Args:
            model: a base without an adapter.
            settings: the recipe's `adapter` section.
            seed: seed of the random initial values.

        Returns:
            The same model.

        Raises:
            ModelError: the model cannot be adapted, for example because it has an adapter already.
            UsageError: the settings match no layer of the model.
        """

    def initial_values(self, settings: Adapter, seed: int) -> InitialValues | None:
        """Return what reads the base's 16-bit weights while they are loaded; None if the method does not need them."""
        return None

    def lr_factor(self, parameter: str, settings: Adapter) -> float:
        """Return the learning rate of the parameter with this name, as a multiple of `optimizer.lr`."""
        return 1.0

    def notes(self, model: nn.Module) -> list[str]:
        """Return remarks for the user about this method on this adapted model."""
        return []

    def course(self, model: nn.Module, settings: Adapter, total_steps: int) -> Course:
        """Return what the method does during a run of `total_steps` steps of this adapted model."""
        return Course()

    def penalises(self, settings: Adapter) -> bool:
        """Return True if the course has a penalty: its gradients are added to those of the loss, in fp32."""
        return False


class AdapterMethod(Method):
    """A method that keeps the base unchanged and saves the trained parameters as an adapter."""

    peft_type: ClassVar[str]
    """name in adapter_config.json"""
    layers: ClassVar[tuple[type[AdaptedLayer], ...]]
    """classes of the adapted layers; no other method has them"""

    why_no_sum: ClassVar[str | None] = "their updates are not low-rank products"
    """why adapters of this method have no sum; None if each update is a low-rank product, as `as_lora` returns it"""

    merge_needs: ClassVar[str] = ""
    """condition of a base that its adapters can be merged into, as "if ..., "; empty if there is none"""

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return True if `config`, the fields of an adapter_config.json, describes an adapter of this method."""
        return config.get("peft_type") == self.peft_type

    def adapts(self, module: nn.Module) -> bool:
        """Return True if the method has a layer for plain layers of the kind of `module`."""
        return any(kind.adapts(module) for kind in self.layers)

    def layer_for(self, module: nn.Module) -> type[AdaptedLayer]:
        """Return the class that adapts `module`, a plain or adapted layer."""
        return layer_class(self.layers, module)

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the frozen tensors that all layers of an adapted model share, by their names in the file."""
        return {}

    def stored_shared(self, config: Mapping[str, Any]) -> list[str]:
        """Return the names in the file of the tensors that all layers share."""
        return []

    def check_shared(
        self,
        linears: Collection[nn.Module],
        specs: Collection[Any],
        tensors: Mapping[str, Tensor],
        file: Path,
    ) -> None:
        """Raise ModelError if the shared tensors, by their names in `file`, do not fit these layers and settings."""

    def load_shared(self, model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Give the adapted layers of `model` the tensors that they share, by their names in `file`."""

    def as_lora(self, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Read the adapter in `folder` as one of LoRA with the same updates.

        Returns:
            The fields of LoRA's config; for each layer name, A and B by suffix, A first.

        Raises:
            ModelError: the updates are not low-rank products, or a file is missing or damaged.
        """
        raise ModelError(
            f"{folder}: adapters of {self.name} cannot be composed, compressed or exported, because {self.why_no_sum}. "
            "Merge them into their base instead, with qlora merge"
        )

    @abstractmethod
    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Return the fields of adapter_config.json for these layers. Raises ModelError if it cannot express them."""

    @abstractmethod
    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if `config`, read from `file`, has a field or value that is not supported."""

    @abstractmethod
    def targets(
        self, model: nn.Module, config: Mapping[str, Any], stored: Mapping[str, Any], file: Path
    ) -> list[str]:
        """Return the names of the layers of `model` that `config` adapts; `stored` has the layers with tensors."""

    @abstractmethod
    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> Any:
        """Return the settings of the layer `name`; `layer_for(module)(module, settings)` then builds it."""
