"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454, equation 2): h = W x + bias + b * B (d * A x).

A and B are random, frozen and shared by all layers; a layer trains only the vectors d [rank] and b [out]. W is frozen,
d starts at 0.1 and b at zero, so the model starts as the base. A is [rank, widest input] and B [widest output, rank]; a
narrower layer uses the first columns of A and the first rows of B, as in PEFT.

d and b are fp32, in the file too: they are so few that it costs nothing, their gradients are sums over all tokens, and
a merge uses them unrounded. A product in bf16 rounds them as it rounds A and B, which are bf16.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.config import check_config, targets_in, targets_of
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.targets import features, select
from qlora.adapter.wrap import wrap
from qlora.errors import ModelError
from qlora.ops.dropout import draw
from qlora.ops.products import Linear
from qlora.ops.vera_linear import vera_linear
from qlora.quantization.nf4 import dense, use_nf4_linears
from qlora.recipe import Adapter

SUFFIX_B, SUFFIX_D = ".vera_lambda_b", ".vera_lambda_d"
SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"
D_INITIAL = 0.1
"""initial value of d (section 4, table 6)"""
SMALL_RANK = 64
"""below this rank a note is shown; the paper uses 256 and 1,024, PEFT's default is 256"""
OWN_FIELDS = ("vera_dropout", "d_initial", "init_weights", "projection_prng_key", "save_projection")
"""fields of PEFT's VeraConfig that its LoraConfig does not have"""


@dataclass(frozen=True)
class VeraSpec:
    """Settings of a VeRA layer."""

    rank: int = 256
    """rows of A, columns of B"""
    dropout: float = 0.0
    """share of A's input that is dropped in training, at least 0 and below 1"""
    seed: int = 0
    """seed of A and B"""
    init: str = "random"
    """"random", or "none": A and B have no numbers before an adapter is loaded"""
    dtype: torch.dtype = torch.bfloat16
    """dtype of A and B; d and b are fp32, or fp64 if this is fp64"""


class Projections(nn.Module):
    """The frozen A [rank, in] and B [out, rank] of all layers: one module, so that they are in memory once."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    @classmethod
    def around(cls, linears: Collection[nn.Linear], spec: VeraSpec) -> "Projections":
        """Make A and B as wide as the widest of these layers, on the device of the first.

        They are drawn on the CPU, so that all devices have the same numbers, Kaiming-uniform as in PEFT: between
        -sqrt(6 / columns) and sqrt(6 / columns).
        """
        widths = [features(linear) for linear in linears]
        in_features, out_features = (max(width) for width in zip(*widths, strict=True))
        device = next(iter(linears)).weight.device
        shapes = (spec.rank, in_features), (out_features, spec.rank)
        if spec.init == "none" or device.type == "meta":
            return cls(*(torch.empty(shape, dtype=spec.dtype, device="meta") for shape in shapes))
        generator = torch.Generator().manual_seed(spec.seed)
        drawn = [
            torch.empty(rows, columns).uniform_(
                -((6 / columns) ** 0.5), (6 / columns) ** 0.5, generator=generator
            )
            for rows, columns in shapes
        ]
        return cls(*(tensor.to(device, spec.dtype) for tensor in drawn))


class VeraLinear(AdaptedLinear):
    """A frozen linear with VeRA's update; maps x [..., in] to W x + bias + b * B (d * A x), [..., out] in x.dtype.

    Args:
        base: an `nn.Linear`, 4-bit linear or `Conv1D`; it is frozen in place.
        spec: rank, dropout, seed and dtype; None means the defaults of `VeraSpec`.
        projections: A and B, at least as wide as the layer; None: random ones of this layer's width.

    Raises:
        ModelError: `base` is not a linear layer.
    """

    SAVED: ClassVar = {SUFFIX_B: "lambda_b", SUFFIX_D: "lambda_d"}
    changes_weight = True
    spec: VeraSpec

    def __init__(
        self, base: nn.Module, spec: VeraSpec | None = None, projections: Projections | None = None
    ) -> None:
        super().__init__(base, spec or VeraSpec())
        device = self.base.weight.device
        dtype = torch.float64 if self.spec.dtype == torch.float64 else torch.float32
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
        self.lambda_d = nn.Parameter(torch.full((self.spec.rank,), D_INITIAL, dtype=dtype, device=device))
        self.projections = projections or Projections.around([self.base], self.spec)

    @property
    def a(self) -> Tensor:
        """A [rank, in]: the first columns of the shared one."""
        return self.projections.a[:, : self.in_features]

    @property
    def b(self) -> Tensor:
        """B [out, rank]: the first rows of the shared one."""
        return self.projections.b[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        dropout = draw(self.spec.dropout if self.training else 0.0, self.number)
        linear = Linear(*self.frozen, self.base.bias, dropout=dropout)
        return vera_linear(x, linear, self.a, self.b, self.lambda_d, self.lambda_b)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: VeraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of b [out] and d [rank]."""
        return {SUFFIX_B: (features(linear)[1],), SUFFIX_D: (spec.rank,)}

    def why_incompatible(self, spec: VeraSpec) -> str | None:
        """Return why the layer cannot load vectors of another rank; None if the rank is the same."""
        if spec.rank == self.spec.rank:
            return None
        return (
            f"has rank {spec.rank} in the file and {self.spec.rank} in the model: load it into a model without an "
            "adapter"
        )

    def numbers(self, weight: Tensor) -> dict[str, float]:
        """Return the rank, and the mean sizes of b and d."""
        b, d = (vector.detach().abs().mean().item() for vector in (self.lambda_b, self.lambda_d))
        return {"rank": self.spec.rank, "mean |b|": b, "mean |d|": d}

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense weight W + diag(b) B diag(d) A [out, in] in fp32, or fp64 if an operand is fp64.

        Args:
            weight: dense W [out, in]; None means the layer's own frozen weight, dequantized if it is 4-bit.
        """
        if weight is None:
            weight = dense(*self.frozen, self.lambda_b.dtype)
        dtype = torch.promote_types(self.lambda_b.dtype, weight.dtype)
        a, b, scale_d, scale_b = (
            tensor.detach().to(weight.device, dtype)
            for tensor in (self.a, self.b, self.lambda_d, self.lambda_b)
        )
        return torch.addmm(weight.detach().to(dtype), b * scale_b[:, None], a * scale_d[:, None])

    def extra_repr(self) -> str:
        """Return the layer's settings for print(model)."""
        return f"rank={self.spec.rank}, dropout={self.spec.dropout:g}"


class Vera(AdapterMethod):
    """VeRA: trains two vectors of every target around random projections that all targets share."""

    name = "vera"
    peft_type = "VERA"
    layers = (VeraLinear,)
    why_no_sum = "a sum of their updates is no product of the shared projections with two vectors"

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model` and wrap each target; the shared A and B depend on the seed and the widest target only."""
        names = select(model, settings.targets)
        use_nf4_linears(model.requires_grad_(False))
        linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
        spec = VeraSpec(settings.rank, settings.dropout, seed)
        shared = Projections.around(linears.values(), spec)
        return wrap(model, {name: VeraLinear(linear, spec, shared) for name, linear in linears.items()})

    def notes(self, model: nn.Module) -> list[str]:
        """Report a rank that is small for VeRA."""
        rank = next(iter(VeraLinear.of(model).values())).spec.rank
        if rank >= SMALL_RANK:
            return []
        return [
            f"vera: rank {rank} is small for VeRA, which trains rank + out numbers a layer. The paper uses 256 and "
            "more: set adapter.rank=256"
        ]

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Return the fields of PEFT's VeraConfig."""
        spec: VeraSpec = next(iter(layers.values())).spec
        return {
            "auto_mapping": None,
            "base_model_name_or_path": base.name,
            "bias": "none",
            "d_initial": D_INITIAL,
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
            "inference_mode": True,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": None,
            "peft_type": self.peft_type,
            "projection_prng_key": spec.seed,
            "r": spec.rank,
            "revision": base.revision,
            "save_projection": True,
            "target_modules": targets_of(model, layers),
            "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
            "vera_dropout": spec.dropout,
        }

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if a field is unknown or not supported."""
        check_config({field: value for field, value in config.items() if field not in OWN_FIELDS}, file)
        if config.get("save_projection") is False:
            raise ModelError(
                f"{file}: save_projection = false is not supported (A and B are not in the file). Save the adapter "
                "with PEFT's save_projection=True"
            )

    def targets(
        self, model: nn.Module, config: Mapping[str, Any], stored: Mapping[str, Any], file: Path
    ) -> list[str]:
        """Return the target layers, chosen as in PEFT."""
        return targets_in(model, config, stored, file)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> VeraSpec:
        """Return the settings, which are the same for every layer; missing fields have PEFT's defaults."""
        rank, dropout = config.get("r", 256), config.get("vera_dropout") or 0.0
        if type(rank) is not int or rank < 1:
            raise ModelError(f"{file}: r must be a whole number of at least 1, not {rank!r}")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ModelError(f"{file}: vera_dropout must be at least 0 and below 1, not {dropout!r}")
        return VeraSpec(rank, float(dropout), config.get("projection_prng_key") or 0, init="none")

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return A and B."""
        projections = next(iter(VeraLinear.of(model).values())).projections
        return {SHARED_A: projections.a, SHARED_B: projections.b}

    def stored_shared(self, config: Mapping[str, Any]) -> list[str]:
        """Return the names of A and B in the file."""
        return [SHARED_A, SHARED_B]

    def check_shared(
        self,
        linears: Collection[nn.Module],
        specs: Collection[VeraSpec],
        tensors: Mapping[str, Tensor],
        file: Path,
    ) -> None:
        """Raise ModelError if A or B is too small for a layer, or has another rank."""
        rank = next(iter(specs)).rank
        widest = [max(width) for width in zip(*map(features, linears), strict=True)]
        for name, dim, width in ((SHARED_A, 1, widest[0]), (SHARED_B, 0, widest[1])):
            shape = list(tensors[name].shape)
            if len(shape) != 2 or shape[1 - dim] != rank or shape[dim] < width:
                raise ModelError(
                    f"{file}: {name} is {shape}, the model needs rank {rank} and a width of at least {width}. Load the "
                    "base that the adapter was trained on"
                )

    def load_shared(self, model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Give all layers the same A and B."""
        layers = list(VeraLinear.of(model).values())
        a, b = tensors[SHARED_A], tensors[SHARED_B]
        own = layers[0].projections
        if (own.a.shape, own.b.shape) == (a.shape, b.shape) and not own.a.is_meta:
            own.a.copy_(a)
            own.b.copy_(b)
            return
        device = layers[0].base.weight.device
        shared = Projections(*(tensor if device.type == "meta" else tensor.to(device) for tensor in (a, b)))
        for layer in layers:
            layer.projections = shared
