"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, equation 3): h = W x + bias + scaling * P L Q x.

P [out, rank], the diagonal L and Q [rank, in] have the form of a singular value decomposition; a penalty keeps P and Q
orthogonal. All layers start with the same rank. During the run the least important triplets are left out, until the
ranks are `adapter.rank` on average (see `rank_allocation`). W is frozen and L is zero at the start, so the model
starts as the base. The tensors have PEFT's names: A is Q, B is P and E [rank, 1] is L.

A and B are bf16; the optimizer keeps the bits that bf16 rounds away. E is fp32, because a singular value scales a whole
triplet, and so that the optimizer has no rest of a value that was set to zero. A and B start normally distributed, with
lengths of about 1, where the penalty wants them; the authors' standard deviation of 0.02 is that of a width of 2,500.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.config import CONFIG_FILE, check_config, read_fields, targets_in, targets_of
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.methods.course import Course
from qlora.adapter.methods.lora import layer_generator
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.methods.rank_allocation import RankAllocation, Schedule
from qlora.adapter.patterns import exactly
from qlora.adapter.peft_tensors import SUFFIX_A as LORA_A
from qlora.adapter.peft_tensors import SUFFIX_B as LORA_B
from qlora.adapter.peft_tensors import read_layers
from qlora.adapter.targets import features, select
from qlora.adapter.trained_parts import part_names, without_parts
from qlora.adapter.wrap import wrap
from qlora.errors import ModelError
from qlora.ops.dropout import draw
from qlora.ops.lora_linear import lora_linear
from qlora.ops.products import Linear, Update
from qlora.quantization.nf4 import dense, use_nf4_linears
from qlora.recipe import Adapter

SUFFIX_A, SUFFIX_B, SUFFIX_E = ".lora_A", ".lora_B", ".lora_E"
EPSILON = 1e-5
"""added to the rank in the scaling by the authors' code and by PEFT"""
OWN_FIELDS = {
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
}
"""fields of PEFT's AdaLoraConfig that its LoraConfig does not have"""


@dataclass(frozen=True)
class AdaloraSpec:
    """Settings of an AdaLoRA layer."""

    initial_rank: int = 12
    """rank at the start, which the scaling is divided by"""
    alpha: float | None = None
    """numerator of the scaling alpha / initial rank; None means the initial rank"""
    dropout: float = 0.0
    """share of A's input that is dropped in training, at least 0 and below 1"""
    kept: tuple[bool, ...] | None = None
    """the triplets of the start that the layer has; None means all"""
    init: str = "gaussian"
    """"gaussian": rows of A and columns of B of length 1 in the mean; or "zero": before an adapter is loaded"""
    dtype: torch.dtype = torch.bfloat16
    """dtype of A and B; E is fp32, or fp64 if this is fp64"""

    @property
    def rank(self) -> int:
        """Number of triplets."""
        return self.initial_rank if self.kept is None else sum(self.kept)

    @property
    def resolved_alpha(self) -> float:
        """alpha, or the initial rank if alpha is None."""
        return self.initial_rank if self.alpha is None else self.alpha

    @property
    def factor(self) -> float:
        """Factor of the update."""
        return self.resolved_alpha / (self.initial_rank + EPSILON)


class AdaloraLinear(AdaptedLinear):
    """A frozen linear with an update B diag(E) A whose rank changes in training (AdaLoRA).

    The layer maps x [..., in] to W x + bias + scaling * B (E * A x), [..., out] in x.dtype.

    Args:
        base: an `nn.Linear`, 4-bit linear or `Conv1D`; it is frozen in place.
        spec: initial rank, alpha, dropout and dtype; None means the defaults of `AdaloraSpec`.
        generator: CPU generator of the initial A and B; None means torch's default generator.

    Raises:
        ModelError: `base` is not a linear layer.
    """

    SAVED: ClassVar = {SUFFIX_A: "lora_a", SUFFIX_B: "lora_b", SUFFIX_E: "lora_e"}
    changes_weight = True
    spec: AdaloraSpec

    def __init__(
        self, base: nn.Module, spec: AdaloraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec or AdaloraSpec())
        device, rank = self.base.weight.device, self.spec.rank
        wide = torch.float64 if self.spec.dtype == torch.float64 else torch.float32
        on = (
            "meta" if device.type == "meta" else "cpu"
        )  # drawn on the CPU, so that all devices have the same numbers
        a, b = torch.zeros(rank, self.in_features, device=on), torch.zeros(self.out_features, rank, device=on)
        if self.spec.init == "gaussian" and on == "cpu":
            a.normal_(0.0, self.in_features**-0.5, generator=generator)
            b.normal_(0.0, self.out_features**-0.5, generator=generator)
        self.lora_a = nn.Parameter(a.to(device, self.spec.dtype))
        self.lora_b = nn.Parameter(b.to(device, self.spec.dtype))
        self.lora_e = nn.Parameter(torch.zeros(rank, 1, dtype=wide, device=device))

    @property
    def rank(self) -> int:
        """Number of triplets."""
        return self.spec.rank

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        dropout = draw(self.spec.dropout if self.training else 0.0, self.number)
        linear = Linear(*self.frozen, self.base.bias, self.spec.factor, dropout)
        return lora_linear(x, linear, Update(self.lora_a * self.lora_e, self.lora_b))

    def prune(self, kept: Tensor) -> None:
        """Remove the triplets that `kept` [rank] leaves out, with new parameters, once. The scaling stays."""
        assert self.spec.kept is None, "the triplets are numbered as at the start"
        for name, dim in (("lora_a", 0), ("lora_b", 1), ("lora_e", 0)):
            rows = getattr(self, name).detach().index_select(dim, kept.nonzero().view(-1))
            setattr(self, name, nn.Parameter(rows))
        self.spec = replace(self.spec, kept=tuple(kept.tolist()))

    @classmethod
    def shapes(cls, linear: nn.Module, spec: AdaloraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A [rank, in], B [out, rank] and E [rank, 1]."""
        in_features, out_features = features(linear)
        return {
            SUFFIX_A: (spec.rank, in_features),
            SUFFIX_B: (out_features, spec.rank),
            SUFFIX_E: (spec.rank, 1),
        }

    def why_incompatible(self, spec: AdaloraSpec) -> str | None:
        """Return why the layer cannot load tensors of another rank; None if the ranks are the same."""
        if (spec.rank, spec.initial_rank) == (self.rank, self.spec.initial_rank):
            return None
        return f"has rank {spec.rank} in the file and {self.rank} in the model: load it into a model without an adapter"

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense weight W + scaling * B diag(E) A [out, in] in fp32, or fp64 if an operand is fp64.

        Args:
            weight: dense W [out, in]; None means the layer's own frozen weight, dequantized if it is 4-bit.
        """
        if weight is None:
            weight = dense(*self.frozen, self.lora_e.dtype)
        dtype = torch.promote_types(self.lora_e.dtype, weight.dtype)
        a, b, e = (part.detach().to(weight.device, dtype) for part in (self.lora_a, self.lora_b, self.lora_e))
        return torch.addmm(weight.detach().to(dtype), b, a * e, alpha=self.spec.factor)

    def extra_repr(self) -> str:
        """Return the layer's settings for print(model)."""
        return f"rank={self.rank} of {self.spec.initial_rank}, dropout={self.spec.dropout:g}"


class Adalora(AdapterMethod):
    """AdaLoRA: trains triplets of every target and keeps the most important ones."""

    name = "adalora"
    peft_type = "ADALORA"
    layers = (AdaloraLinear,)
    why_no_sum = None

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model` and wrap each target; its initial A and B depend only on the seed and its name."""
        names = select(model, settings.targets)
        use_nf4_linears(model.requires_grad_(False))
        spec = AdaloraSpec(settings.initial_rank, settings.alpha, settings.dropout)
        return wrap(
            model,
            {
                name: AdaloraLinear(model.get_submodule(name), spec, layer_generator(seed, name))
                for name in names
            },
        )

    def course(self, model: nn.Module, settings: Adapter, total_steps: int) -> Course:
        """Return the allocation of the ranks over the run."""
        layers, budget = AdaloraLinear.of(model), settings.budget
        schedule = Schedule(
            start=int(budget.start * total_steps),
            end=max(1, total_steps - int(budget.final * total_steps)),
            every=budget.every,
            first=settings.initial_rank * len(layers),
            last=settings.rank * len(layers),
        )
        decays = budget.smoothing, budget.uncertainty_smoothing
        return RankAllocation(layers, schedule, budget.orthogonality, decays)

    def penalises(self, settings: Adapter) -> bool:
        """Return True if the directions are kept orthogonal."""
        return settings.budget.orthogonality > 0

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Return the fields of PEFT's AdaLoraConfig. PEFT needs a total_step, which only its own training uses."""
        spec: AdaloraSpec = next(iter(layers.values())).spec
        kept = {f"{name}.lora_E": list(x.spec.kept) for name, x in layers.items() if x.spec.kept is not None}
        return {
            "auto_mapping": None,
            "base_model_name_or_path": base.name,
            "bias": "none",
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
            "inference_mode": True,
            "init_r": spec.initial_rank,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": spec.resolved_alpha,
            "lora_dropout": spec.dropout,
            "modules_to_save": None,
            "peft_type": self.peft_type,
            "rank_pattern": kept or None,
            "revision": base.revision,
            "target_modules": targets_of(model, layers),
            "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
            "total_step": 1,
        }

    def as_lora(self, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Read the adapter as LoRA of scaling 1, with E and the scaling in A. Layers without a triplet are left out."""
        file = folder / CONFIG_FILE
        config = read_fields(file)
        self.check(without_parts(config, file), file)
        suffixes = list(AdaloraLinear.SAVED)
        stored, _ = read_layers(folder, [suffixes], part_names(folder, config, suffixes))
        factors = {name: self.spec(config, name, file).factor for name in stored}
        pairs = {
            name: {
                LORA_A: parts[SUFFIX_A].float() * parts[SUFFIX_E].float() * factors[name],
                LORA_B: parts[SUFFIX_B].float(),
            }
            for name, parts in stored.items()
            if parts[SUFFIX_E].numel()
        }
        ranks = {exactly(name): len(pair[LORA_A]) for name, pair in pairs.items()}
        kept = {field: value for field, value in config.items() if field not in OWN_FIELDS}
        return {
            **kept, "peft_type": "LORA", "target_modules": sorted(pairs), "rank_pattern": ranks, "alpha_pattern": ranks,
            "use_rslora": False, "layers_to_transform": None, "layers_pattern": None,
        }, pairs  # fmt: skip

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if a field is unknown or not supported."""
        check_config({field: value for field, value in config.items() if field not in OWN_FIELDS}, file)
        for key, kept in (config.get("rank_pattern") or {}).items():
            if not isinstance(kept, list) or not all(type(entry) is bool for entry in kept):
                raise ModelError(
                    f"{file}: rank_pattern of {key} must be a list of true and false. Restore the file"
                )

    def targets(
        self, model: nn.Module, config: Mapping[str, Any], stored: Mapping[str, Any], file: Path
    ) -> list[str]:
        """Return the target layers, chosen as in PEFT."""
        return targets_in(model, config, stored, file)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> AdaloraSpec:
        """Return the settings of the layer `name`; missing fields have PEFT's defaults."""
        rank, alpha, dropout = (
            config.get("init_r", 12),
            config.get("lora_alpha", 8),
            config.get("lora_dropout") or 0.0,
        )
        kept = (config.get("rank_pattern") or {}).get(f"{name}.lora_E")
        if type(rank) is not int or rank < 1 or (kept is not None and len(kept) != rank):
            raise ModelError(
                f"{file}: init_r must be a whole number of at least 1, and the length of the lists in rank_pattern. "
                "Restore the file"
            )
        if type(alpha) not in (int, float) or not 0 < alpha < 1e300:
            raise ModelError(f"{file}: lora_alpha must be a number above 0, not {alpha!r}")
        if not 0 <= dropout < 1:
            raise ModelError(f"{file}: lora_dropout must be at least 0 and below 1, not {dropout!r}")
        return AdaloraSpec(rank, alpha, float(dropout), None if kept is None else tuple(kept), init="zero")
