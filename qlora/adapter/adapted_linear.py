"""Base class of adapted linears, and the list of the parameters that training changes."""

from typing import Any

from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.targets import features, is_conv1d, is_linear
from qlora.quantization.expert_stack import ExpertStack
from qlora.quantization.nf4 import QuantState, quant_state


class AdaptedLinear(AdaptedLayer):
    """A frozen linear layer with the parameters that an adapter method trains around it.

    Args:
        base: an `nn.Linear`, 4-bit linear or `Conv1D`; it is frozen in place.
        spec: settings of the layer, of a type that the method defines.

    Raises:
        ModelError: `base` is not a linear layer.
    """

    base: nn.Linear

    def __init__(self, base: nn.Module, spec: Any = None) -> None:
        super().__init__(base, spec)
        self.fan_in_fan_out = is_conv1d(base)
        self.in_features, self.out_features = features(base)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return True for linear layers."""
        return is_linear(module)

    @classmethod
    def why_unsuitable(cls, base: nn.Module) -> str | None:
        """Return why `base` is no linear layer; None if it is one."""
        return None if cls.adapts(base) else "pass nn.Linear, Linear4bit or Conv1D"

    @property
    def frozen(self) -> tuple[Tensor, QuantState | None]:
        """Weight of the base [out, in], and its quantization state if it is packed NF4."""
        return self.base.weight.T if self.fan_in_fan_out else self.base.weight, quant_state(self.base)


def other_layers(model: nn.Module) -> list[str]:
    """Return the names of the adapted layers of `model` that are neither linears nor experts, such as convolutions."""
    return [
        name
        for name, layer in AdaptedLayer.of(model).items()
        if not isinstance(layer, AdaptedLinear) and not isinstance(layer.base, ExpertStack)
    ]


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
