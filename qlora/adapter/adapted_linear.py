"""The frozen linear with something trainable beside it, and how a model gets and lists such layers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from qlora.adapter.targets import features, is_conv1d, is_linear
from qlora.errors import ModelError
from qlora.quantization.nf4 import QuantState, quant_state
from qlora.runtime.seeds import key_of


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear`, 4-bit linear or `Conv1D`, and what an adapter method trains beside it.

    A method derives its layer from this one: it names its tensors (`SAVED`), gives their `shapes`, computes
    (`forward`) and merges what it `changes_...`: `merged_weight`, `merged_bias` or both.

    There is no `weight` on purpose: code that reads it would pass the update by, and nobody would notice.
    Raises ModelError for a module that is no linear layer.
    """

    SAVED: ClassVar[Mapping[str, str]]
    """what follows the layer's name in an adapter's file -> the parameter"""
    changes_weight: ClassVar[bool] = False
    changes_bias: ClassVar[bool] = False

    def __init__(self, base: nn.Module, spec: Any = None) -> None:
        super().__init__()
        self.spec = spec
        """the layer's settings"""
        self.number: int | None = None
        """what the layer's dropout is known by"""
        if not is_linear(base):
            kind = type(self).__name__
            raise ModelError(f"{kind} wraps nn.Linear, Linear4bit and Conv1D, not {type(base).__name__}")
        self.base: nn.Linear = base.requires_grad_(False)
        self.fan_in_fan_out = is_conv1d(base)
        """the base's weight is stored as [in, out]; PEFT's name for it"""
        self.in_features, self.out_features = features(base)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the `SAVED` tensors beside `linear`, a linear or an adapted one."""
        raise NotImplementedError

    def saved(self) -> dict[str, nn.Parameter]:
        """The trained parameters by what follows the layer's name in an adapter's file."""
        return {suffix: getattr(self, attribute) for suffix, attribute in self.SAVED.items()}

    def misfit(self, spec: Any) -> str | None:
        """Why the layer cannot take tensors of these settings; None where it can."""
        return None

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The dense weight [out, in] with what was trained in it; `weight` None is the base's own."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor | None = None) -> Tensor:
        """The bias [out] with what was trained in it; `bias` None is the base's own, or zero."""
        raise NotImplementedError

    @property
    def frozen(self) -> tuple[Tensor, QuantState | None]:
        """The base's weight [out, in], and its quantization state if it is packed NF4."""
        return self.base.weight.T if self.fan_in_fan_out else self.base.weight, quant_state(self.base)

    def __getattr__(self, name: str) -> Any:
        """Parameters and modules, as in every module; says why there is no weight."""
        if name in ("weight", "bias"):
            raise AttributeError(
                f"the model reads `{name}` past the adapted layer: leave it out of the targets"
            )
        return super().__getattr__(name)

    @classmethod
    def of(cls, model: nn.Module) -> dict[str, Self]:
        """The layers of this class in `model` by name, in its order."""
        return {name: module for name, module in model.named_modules() if isinstance(module, cls)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name.

    >>> optimizer = torch.optim.AdamW(trainable_parameters(adapt(model)).values(), lr=2e-4)
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def wrap(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> nn.Module:
    """Put each adapted layer in the place of its base, whose name in `model` is its key; returns the model."""
    for name, layer in layers.items():
        layer.number = key_of(name)
    _replace(model, {layer.base: layer for layer in layers.values()})
    _forbid_fused_inference(model)
    return model


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value where its key stands, everywhere: a module may be shared under several names."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child])


def _forbid_fused_inference(model: nn.Module) -> None:
    """In eval mode torch's encoder computes from the weights of its layers and never calls them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "no activation that the fused path knows"
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
