"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): h = W x + b + u, with W and b frozen and u [out] zero at the start.

Only u, the update of a target linear's bias, is trained, so the model starts bit for bit as the base. A linear
without a bias starts at a zero bias. The paper also trains the biases of norms. We leave them frozen, because our
adapters change only linears.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_linear import AdaptedLinear, wrap
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.targets import features, linear_names, list_linears, select
from qlora.errors import ModelError, listed
from qlora.quantization.nf4 import frozen_linear, use_nf4_linears
from qlora.recipe import Adapter


@dataclass(frozen=True)
class BiasSpec:
    """Settings of a BitFit layer: only the dtype."""

    dtype: torch.dtype = torch.bfloat16
    """dtype of the update"""


class BiasLinear(AdaptedLinear):
    """A frozen linear with a trained update of its bias; maps x [..., in] to [..., out] in x.dtype."""

    SAVED: ClassVar = {".bias_update": "bias_update"}
    changes_bias = True

    def __init__(self, base: nn.Module, spec: BiasSpec | None = None) -> None:
        super().__init__(base, spec or BiasSpec())
        zeros = torch.zeros(self.out_features, dtype=self.spec.dtype, device=self.base.weight.device)
        self.bias_update = nn.Parameter(zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        y = frozen_linear(x, *self.frozen, self.base.bias)
        return y + self.bias_update.to(y.dtype)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: BiasSpec) -> dict[str, tuple[int, ...]]:
        """Return the shape of the update: one number per output."""
        return {".bias_update": (features(linear)[1],)}

    def merged_bias(self, bias: Tensor | None = None) -> Tensor:
        """Return b + u [out] in fp32."""
        bias = self.base.bias if bias is None else bias
        update = self.bias_update.detach().float()
        return update if bias is None else bias.detach().float() + update.to(bias.device)


class BitFit(AdapterMethod):
    """BitFit: trains the biases of linears."""

    name = "bitfit"
    peft_type = "BITFIT"  # PEFT has no such method and rejects it
    layers = (BiasLinear,)
    why_no_sum = "they change biases, not weights"

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model` and add a trainable bias update to each target."""
        names = select(model, settings.targets)
        use_nf4_linears(model.requires_grad_(False))
        return wrap(model, {name: BiasLinear(model.get_submodule(name)) for name in names})

    def notes(self, model: nn.Module) -> list[str]:
        """Report the number of target layers without a bias in the base."""
        layers = BiasLinear.of(model)
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
        names, linears = config["target_modules"], linear_names(model)
        missing = [name for name in names if name not in linears]
        if missing or not names:
            reason = (
                f"no linear layer {listed(missing)}. {list_linears(linears)} Load the base that it was trained on"
                if names
                else "target_modules is empty. Restore the file"
            )
            raise ModelError(f"{file}: the adapter does not fit this model: {reason}")
        return list(names)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> BiasSpec:
        """Return the settings, which are the same for every layer."""
        return BiasSpec()
