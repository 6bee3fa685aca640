"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): h = W x + b + u, W and b frozen, u [out] zero at the start.

Only the update u of a target linear's bias is trained, so the model starts as the base to the last bit. A linear
without a bias starts at a zero bias. The paper trains the biases of norms too; they are left alone here, since an
adapter changes linears.
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
from qlora.adapter.targets import features, linear_names, offer, select
from qlora.errors import ModelError
from qlora.quantization.nf4 import frozen_linear, protect
from qlora.recipe import Adapter


@dataclass(frozen=True)
class BiasSpec:
    """Settings of a layer: there is nothing to choose but the dtype."""

    dtype: torch.dtype = torch.bfloat16


class BiasLinear(AdaptedLinear):
    """A frozen linear with a trained update of its bias; x [..., in] -> [..., out] in x.dtype."""

    SAVED: ClassVar = {".bias_update": "bias_update"}
    changes_bias = True

    def __init__(self, base: nn.Module, spec: BiasSpec | None = None) -> None:
        super().__init__(base, spec or BiasSpec())
        zeros = torch.zeros(self.out_features, dtype=self.spec.dtype, device=self.base.weight.device)
        self.bias_update = nn.Parameter(zeros)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = frozen_linear(x, *self.frozen, self.base.bias)
        return y + self.bias_update.to(y.dtype)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: BiasSpec) -> dict[str, tuple[int, ...]]:
        """One number for each output."""
        return {".bias_update": (features(linear)[1],)}

    def merged_bias(self, bias: Tensor | None = None) -> Tensor:
        """b + u [out] in fp32."""
        bias = self.base.bias if bias is None else bias
        update = self.bias_update.detach().float()
        return update if bias is None else bias.detach().float() + update.to(bias.device)


class BitFit(AdapterMethod):
    """Trains the biases of linears."""

    name = "bitfit"
    peft_type = "BITFIT"  # PEFT has no such method, and says so
    layer = BiasLinear

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model`, and give each of its targets an update of the bias."""
        names = select(model, settings.targets)
        protect(model.requires_grad_(False))
        return wrap(model, {name: BiasLinear(model.get_submodule(name)) for name in names})

    def notes(self, model: nn.Module) -> list[str]:
        """How many layers the base has no bias in."""
        layers = BiasLinear.of(model)
        without = sum(layer.base.bias is None for layer in layers.values())
        if not without:
            return []
        return [
            f"bitfit: {without} of {len(layers)} target layers have no bias in the base; they start at zero"
        ]

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """What it is, the base and the names of the layers."""
        return {
            "base_model_name_or_path": base.name,
            "peft_type": self.peft_type,
            "revision": base.revision,
            "target_modules": list(layers),
        }

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Allow the fields that `config` writes."""
        known = {"base_model_name_or_path", "peft_type", "revision", "target_modules"}
        if unknown := sorted(config.keys() - known):
            raise ModelError(f"{file}: {unknown[0]} is a field that this version of qlora does not know")
        targets = config.get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise ModelError(f"{file}: target_modules must be a list of the layers' names")

    def targets(
        self, model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], file: Path
    ) -> list[str]:
        """The layers that the config names."""
        names, linears = config["target_modules"], linear_names(model)
        missing = [name for name in names if name not in linears]
        if missing or not names:
            which = f"no linear layer {missing[0]}. {offer(linears)}" if names else "no layer that it names"
            raise ModelError(f"{file}: the adapter does not fit this model: it has {which}")
        return list(names)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> BiasSpec:
        """The same for every layer."""
        return BiasSpec()
