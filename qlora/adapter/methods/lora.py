"""LoRA (Hu et al. 2021): h = W x + scaling * B A x, W frozen, A [rank, in] random, B [out, rank] zero.

`LoRALinear` wraps an `nn.Linear`, a 4-bit linear or GPT-2's `Conv1D` and leaves it as it is; `adapt` puts one
around every target of any model. A and B are bf16; the optimizer keeps what bf16 would round away.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_linear import AdaptedLinear, wrap
from qlora.adapter.config import check_config, config_of, spec_of_layer, targets_in
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.patterns import fits
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B
from qlora.adapter.targets import features, select
from qlora.errors import ModelError, UsageError
from qlora.ops.dropout import draw
from qlora.ops.lora_linear import lora_linear
from qlora.ops.products import Linear, Update
from qlora.quantization.nf4 import dense, protect
from qlora.recipe import Adapter


class LoRALinear(AdaptedLinear):
    """A frozen linear with a trainable low-rank update; x [..., in] -> [..., out] in x.dtype.

        >>> layer = LoRALinear(nn.Linear(input_dim, output_dim), LoraSpec(rank=4, alpha=8))

    base: an `nn.Linear`, 4-bit linear or `Conv1D`, kept as it is and frozen; its bias stays in use.
    spec: rank, alpha, dropout, scaling, initialisation and dtype.
    generator: a CPU generator for A; None: torch's.
    """

    SAVED: ClassVar = {SUFFIX_A: "lora_a", SUFFIX_B: "lora_b"}
    changes_weight = True
    spec: LoraSpec

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        spec = spec or LoraSpec()
        super().__init__(base, spec)
        device = self.base.weight.device
        a = _initial(spec.init, (spec.rank, self.in_features), device, generator)
        self.lora_a = nn.Parameter(a.to(device, spec.dtype))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, spec.rank, device=device, dtype=spec.dtype))

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.spec.rank

    @property
    def alpha(self) -> float:
        """The update is scaled by alpha/rank, or alpha/sqrt(rank)."""
        return self.spec.resolved_alpha

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.spec.factor

    @property
    def dropout(self) -> float:
        """Share of the input of A that is dropped in training."""
        return self.spec.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return lora_linear(x, *self.product())

    def product(self) -> tuple[Linear, Update]:
        """The layer as our products take it, with the next dropout mask if it is training."""
        weight, state = self.frozen
        dropout = draw(self.dropout if self.training else 0.0, self.number)
        return Linear(weight, state, self.base.bias, self.scaling, dropout), Update(self.lora_a, self.lora_b)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """A [rank, in] and B [out, rank]."""
        in_features, out_features = features(linear)
        return {SUFFIX_A: (spec.rank, in_features), SUFFIX_B: (out_features, spec.rank)}

    def misfit(self, spec: LoraSpec) -> str | None:
        """Ranks cannot be switched."""
        if spec.rank == self.rank:
            return None
        return f"has rank {spec.rank}, and {self.rank} in the model: ranks cannot be switched"

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """The dense weight [out, in] that computes what the layer computes without dropout; fp32 or wider.

            >>> y = torch.nn.functional.linear(x, layer.merged_weight(), layer.base.bias)

        weight: what to add the update to, on any device and there the result is; None is the layer's own frozen
            weight, dequantized if it is in 4 bits.

        The sum is taken in fp32 (fp64 where an operand is fp64), whatever W, A and B are stored in; NF4 weights are
        dequantized to fp32, which holds them exactly. So the result is right to fp32's own rounding, and the first
        real rounding is the caller's, who stores it in 16 or 4 bits.
        """
        if weight is None:
            packed, state = self.base.weight, self.frozen[1]
            weight = dense(packed, state, _wide(self.lora_a, packed))
            weight = weight.T if self.fan_in_fan_out else weight
        assert weight.shape == (self.out_features, self.in_features), (
            f"{weight.shape} is not the layer's shape"
        )
        dtype = _wide(self.lora_a, weight)
        a = self.lora_a.detach().to(weight.device, dtype)
        b = self.lora_b.detach().to(weight.device, dtype)
        return torch.addmm(weight.detach().to(dtype), b, a, alpha=self.scaling)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Lora(AdapterMethod):
    """Trains A and B of every target."""

    name = "lora"
    peft_type = "LORA"
    layer = LoRALinear

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """See `adapt`."""
        spec = LoraSpec(
            rank=settings.rank,
            alpha=settings.resolved_alpha,
            dropout=settings.dropout,
            scaling=settings.scaling,
            init=settings.init,
            targets=settings.targets,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
        )
        return adapt(model, spec, seed=seed)

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """PEFT's LoraConfig."""
        return config_of(model, layers, base)

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Every field is obeyed, known to say nothing, or refused by name."""
        check_config(config, file)

    def targets(
        self, model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], file: Path
    ) -> list[str]:
        """As PEFT would choose them."""
        return targets_in(model, config, found, file)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> LoraSpec:
        """Absent fields have PEFT's defaults."""
        return spec_of_layer(config, name, file)


def adapt(model: nn.Module, spec: LoraSpec | None = None, *, seed: int = 0) -> nn.Module:
    """Freeze `model` and wrap its targets (see `select`) in LoRALinears, in place; returns the model.

        >>> model = adapt(model, LoraSpec(rank=16, targets="all-linear"))

    Works for any `nn.Module` with linear layers, on the meta device too. Each A depends on (seed, name of the layer)
    alone, whatever the device and the other targets.

    Raises ModelError if the model is adapted already, UsageError if an argument is wrong or matches no layer.
    """
    spec = spec or LoraSpec()
    if AdaptedLinear.of(model):
        raise ModelError("the model has an adapter already: adapt a base, or load an adapter into this one")
    names = select(model, spec.targets)
    for key in [*spec.rank_pattern, *spec.alpha_pattern]:
        if not any(fits(key, name) for name in names):
            raise UsageError(f'rank_pattern or alpha_pattern: "{key}" matches no targeted layer')
    protect(model.requires_grad_(False))
    layers = {
        name: LoRALinear(model.get_submodule(name), spec.of_layer(name), layer_generator(seed, name))
        for name in names
    }
    return wrap(model, layers)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of `model` by name, in its order.

    >>> sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in lora_layers(model).values())
    """
    return LoRALinear.of(model)


def lora_parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """Trainable parameters of one adapted layer: A and B have rank * (in + out)."""
    return rank * (in_features + out_features)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _initial(
    init: str, shape: tuple[int, int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """The first A [rank, in], fp32, drawn on the CPU so that every device starts from the same numbers."""
    if device.type == "meta":
        return torch.empty(shape, device=device)
    if init == "zero":
        return torch.zeros(shape)
    a = torch.empty(shape)
    if init == "gaussian":
        return a.normal_(0.0, 1 / shape[0], generator=generator)
    bound = 1 / math.sqrt(shape[1])
    return a.uniform_(-bound, bound, generator=generator)


def _wide(*operands: Tensor) -> torch.dtype:
    """fp32, or fp64 where there is one."""
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
