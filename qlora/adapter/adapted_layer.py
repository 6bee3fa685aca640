"""Base class of adapted layers: a frozen layer of the model with the parameters that a method trains around it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from qlora.errors import ModelError

Layer = TypeVar("Layer", bound="AdaptedLayer")


class AdaptedLayer(nn.Module):
    """A frozen layer with the parameters that an adapter method trains around it.

    A method derives its own layers from this class. The subclass names its tensors (`SAVED`), reports their `shapes`,
    computes the output (`forward`), and implements `merged_weight`, `merged_bias` or both.

    The class has no `weight` on purpose: code that reads the weight directly would silently skip the update.

    Args:
        base: the layer to adapt; it is frozen in place.
        spec: settings of the layer, of a type that the method defines.

    Raises:
        ModelError: the class cannot adapt `base`; the message says why.
    """

    SAVED: ClassVar[Mapping[str, str]]
    """suffix of a tensor's name in the adapter file -> attribute with the parameter"""
    changes_weight: ClassVar[bool] = False
    """True if the update changes the weight"""
    changes_bias: ClassVar[bool] = False
    """True if the update changes the bias"""
    fan_in_fan_out: bool = False
    """True if the base stores its weight transposed, as [in, out]; the name is PEFT's"""
    base: Any
    """the frozen layer; subclasses say its type"""

    def __init__(self, base: nn.Module, spec: Any = None) -> None:
        super().__init__()
        if (reason := self.why_unsuitable(base)) is not None:
            raise ModelError(f"{type(self).__name__} cannot wrap {type(base).__name__}: {reason}")
        self.spec = spec
        """settings of the layer"""
        self.number: int | None = None
        """key of the layer's dropout masks, derived from the layer's name; None outside a model"""
        self.base = base.requires_grad_(False)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return True if this class is for plain layers of the kind of `module`."""
        raise NotImplementedError

    @classmethod
    def why_unsuitable(cls, base: nn.Module) -> str | None:
        """Return why this class cannot adapt `base`, with the way out; None if it can."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, module: nn.Module, spec: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `SAVED` tensors for `module`, a plain or adapted layer."""
        raise NotImplementedError

    def saved(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the suffix of their names in the adapter file."""
        return {suffix: getattr(self, attribute) for suffix, attribute in self.SAVED.items()}

    def why_incompatible(self, spec: Any) -> str | None:
        """Return why the layer cannot load tensors with the settings `spec`; None if it can."""
        return None

    def numbers(self, weight: Tensor) -> dict[str, float]:
        """Return numbers of the update for `qlora adapter inspect`, by heading; `weight` is the base's, dense."""
        return {}

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense weight plus the update; `weight` None means the base's own weight."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor | None = None) -> Tensor:
        """Return the bias [out] plus the update; `bias` None means the base's own bias, or zero."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Look up parameters and modules; for `weight` and `bias`, raise an error that explains their absence."""
        if name in ("weight", "bias"):
            raise AttributeError(
                f"the model reads `{name}` instead of calling the adapted layer: leave this layer out of the targets"
            )
        return super().__getattr__(name)

    @classmethod
    def of(cls, model: nn.Module) -> dict[str, Self]:
        """Return the layers of this class in `model` by name, in the order of the model."""
        return {name: module for name, module in model.named_modules() if isinstance(module, cls)}


def layer_class(classes: Sequence[type[Layer]], module: nn.Module) -> type[Layer]:
    """Return the class that adapts `module`, a plain or adapted layer; the first class if none does."""
    base = module.base if isinstance(module, AdaptedLayer) else module
    return next((kind for kind in classes if kind.adapts(base)), classes[0])
