"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): h = W x + b + u, with W and b frozen and u [out] zero at the start.

Only u, the update of a target's bias, is trained, so the model starts bit for bit as the base. A linear or convolution
without a bias starts at a zero bias. The paper also trains the biases of norms, which are no targets here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.lora_conv import is_convolution
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.targets import features, layer_names, list_layers, select
from qlora.adapter.wrap import wrap
from qlora.errors import ModelError, listed
from qlora.quantization.nf4 import frozen_linear, use_nf4_linears
from qlora.recipe import Adapter


@dataclass(frozen=True)
class BiasSpec:
    """Settings of a BitFit layer: only the dtype."""

    dtype: torch.dtype = torch.bfloat16
    """dtype of the update"""


class BiasLayer(AdaptedLayer):
    """A frozen layer with a trained update u [out] of its bias, zero at the start."""

    SAVED: ClassVar = {".bias_update": "bias_update"}
    changes_bias = True

    def __init__(self, base: nn.Module, spec: BiasSpec | None = None) -> None:
        super().__init__(base, spec or BiasSpec())
        shape = self.shapes(base, self.spec)[".bias_update"]
        zeros = torch.zeros(shape, dtype=self.spec.dtype, device=self.base.weight.device)
        self.bias_update = nn.Parameter(zeros)

    def merged_bias(self, bias: Tensor | None = None) -> Tensor:
        """Return b + u [out] in fp32."""
        bias = self.base.bias if bias is None else bias
        update = self.bias_update.detach().float()
        return update if bias is None else bias.detach().float() + update.to(bias.device)


class BiasLinear(BiasLayer, AdaptedLinear):
    """A frozen linear with a trained update of its bias; maps x [..., in] to [..., out] in x.dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        y = frozen_linear(x, *self.frozen, self.base.bias)
        return y + self.bias_update.to(y.dtype)

    @classmethod
    def shapes(cls, module: nn.Module, spec: BiasSpec) -> dict[str, tuple[int, ...]]:
        """Return the shape of the update: one number per output."""
        return {".bias_update": (features(module)[1],)}


class BiasConv(BiasLayer):
    """A frozen convolution with a trained update of its bias; maps x [N, in, ...] to [N, out, ...] in x.dtype."""

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return True for convolutions."""
        return is_convolution(module)

    @classmethod
    def why_unsuitable(cls, base: nn.Module) -> str | None:
        """Return why `base` is no convolution; None if it is one."""
        return None if cls.adapts(base) else "pass nn.Conv1d, nn.Conv2d or nn.Conv3d"

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, in, ...] to [N, out, ...]."""
        y: Tensor = self.base(x)
        return y + self.bias_update.to(y.dtype).view(-1, *(1 for _ in self.base.kernel_size))

    @classmethod
    def shapes(cls, module: nn.Module, spec: BiasSpec) -> dict[str, tuple[int, ...]]:
        """Return the shape of the update: one number per output channel."""
        base: Any = module.base if isinstance(module, AdaptedLayer) else module
        return {".bias_update": (base.out_channels,)}


class BitFit(AdapterMethod):
    """BitFit: trains the biases of linears and convolutions."""

    name = "bitfit"
    peft_type = "BITFIT"  # PEFT has no such method and rejects it
    layers = (BiasLinear, BiasConv)
    why_no_sum = "they change biases, not weights"
    merge_needs = "if the layers of the base have biases, "

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model` and add a trainable bias update to each target."""
        names = select(model, settings.targets, self.adapts)
        use_nf4_linears(model.requires_grad_(False))
        modules = {name: model.get_submodule(name) for name in names}
        return wrap(model, {name: self.layer_for(module)(module) for name, module in modules.items()})

    def notes(self, model: nn.Module) -> list[str]:
        """Report the number of target layers without a bias in the base."""
        layers = BiasLayer.of(model)
        without = sum(layer.base.bias is None for layer in layers.values())
        if not without:
            return []
        return [
            f"bitfit: {without} of {len(layers)} target layers have no bias in the base; they start at zero"
        ]

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Return the fields of adapter_config.json: the method, the base and the names of the layers."""
        return {
            "base_model_name_or_path": base.name,
            "peft_type": self.peft_type,
            "revision": base.revision,
            "target_modules": list(layers),
        }

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if `config` has other fields than the method `config` writes."""
        known = {"base_model_name_or_path", "peft_type", "revision", "target_modules"}
        if unknown := sorted(config.keys() - known):
            raise ModelError(
                f"{file}: {unknown[0]} is a field that this version of qlora does not know; update qlora, or remove it"
            )
        targets = config.get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise ModelError(f"{file}: target_modules must be a list of layer names")

    def targets(
        self, model: nn.Module, config: Mapping[str, Any], stored: Mapping[str, Any], file: Path
    ) -> list[str]:
        """Return the layers that the config names."""
        names, layers = config["target_modules"], layer_names(model, self.adapts)
        missing = [name for name in names if name not in layers]
        if missing or not names:
            reason = (
                f"no layer {listed(missing)}. {list_layers(model, layers)} Load the base that it was trained on"
                if names
                else "target_modules is empty. Restore the file"
            )
            raise ModelError(f"{file}: the adapter does not fit this model: {reason}")
        return list(names)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> BiasSpec:
        """Return the settings, which are the same for every layer."""
        return BiasSpec()
