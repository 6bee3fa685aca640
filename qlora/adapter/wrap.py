"""Puts adapted layers into a model in place of its own."""

from collections.abc import Mapping

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.base_digest import remember_base
from qlora.runtime.seeds import key_of


def wrap(model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> nn.Module:
    """Replace layers of `model` with adapted layers, in place.

    Args:
        model: the model that contains the base of each layer.
        layers: the adapted layers by the name of their base in `model`.

    Returns:
        The same model.
    """
    remember_base(model)
    for name, layer in layers.items():
        layer.number = key_of(name)
    replace_modules(model, {layer.base: layer for layer in layers.values()})
    _forbid_fused_inference(model)
    return model


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each key by its value wherever it occurs in `model`: a module can be shared under several names."""
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
