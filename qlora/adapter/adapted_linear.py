"""Base class of adapted layers, and the functions that put them into a model and list them."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from qlora.adapter.targets import features, is_conv1d, is_linear
from qlora.errors import ModelError
from qlora.quantization.nf4 import QuantState, quant_state
from qlora.runtime.seeds import key_of


class AdaptedLinear(nn.Module):
    """A frozen linear layer with the parameters that an adapter method trains around it.

    A method derives its own layer from this class. The subclass names its tensors (`SAVED`), reports their `shapes`,
    computes the output (`forward`), and implements `merged_weight`, `merged_bias` or both.

    The class has no `weight` on purpose: code that reads the weight directly would silently skip the update.

    Args:
        base: an `nn.Linear`, 4-bit linear or `Conv1D`; it is frozen in place.
        spec: settings of the layer, of a type that the method defines.

    Raises:
        ModelError: `base` is not a linear layer.
    """

    SAVED: ClassVar[Mapping[str, str]]
    """suffix of a tensor's name in the adapter file -> attribute with the parameter"""
    changes_weight: ClassVar[bool] = False
    """True if the update changes the weight"""
    changes_bias: ClassVar[bool] = False
    """True if the update changes the bias"""

    def __init__(self, base: nn.Module, spec: Any = None) -> None:
        super().__init__()
        self.spec = spec
        """settings of the layer"""
        self.number: int | None = None
        """key of the layer's dropout masks, derived from the layer's name; None outside a model"""
        if not is_linear(base):
            kind = type(self).__name__
            raise ModelError(
                f"{kind} cannot wrap {type(base).__name__}; pass nn.Linear, Linear4bit or Conv1D"
            )
        self.base: nn.Linear = base.requires_grad_(False)
        self.fan_in_fan_out = is_conv1d(base)
        """True if the base stores its weight as [in, out]; the name is PEFT's"""
        self.in_features, self.out_features = features(base)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the `SAVED` tensors for `linear`, a plain or adapted linear layer."""
        raise NotImplementedError

    def saved(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the suffix of their names in the adapter file."""
        return {suffix: getattr(self, attribute) for suffix, attribute in self.SAVED.items()}

    def why_incompatible(self, spec: Any) -> str | None:
        """Return why the layer cannot load tensors with the settings `spec`; None if it can."""
        return None

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense weight [out, in] plus the update; `weight` None means the base's own weight."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor | None = None) -> Tensor:
        """Return the bias [out] plus the update; `bias` None means the base's own bias, or zero."""
        raise NotImplementedError

    @property
    def frozen(self) -> tuple[Tensor, QuantState | None]:
        """Weight of the base [out, in], and its quantization state if it is packed NF4."""
        return self.base.weight.T if self.fan_in_fan_out else self.base.weight, quant_state(self.base)

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


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name.

    Args:
        model: a model, adapted or not.

    Returns:
        The parameters with `requires_grad`, in the order of the model.

    Examples:
        >>> optimizer = torch.optim.AdamW(trainable_parameters(adapt(model)).values(), lr=2e-4)
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def wrap(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> nn.Module:
    """Replace linear layers of `model` with adapted layers, in place.

    Args:
        model: the model that contains the base of each layer.
        layers: the adapted layers by the name of their base in `model`.

    Returns:
        The same model.
    """
    for name, layer in layers.items():
        layer.number = key_of(name)
    replace_modules(model, {layer.base: layer for layer in layers.values()})
    _forbid_fused_inference(model)
    return model


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each key by its value wherever it occurs: a module can be shared under several names."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child])


def _forbid_fused_inference(model: nn.Module) -> None:
    """Turn off torch's fused encoder: in eval mode it reads the weights of its layers and never calls the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # 0 means an activation that the fused path does not support
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
