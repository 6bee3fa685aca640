"""LoRA (Hu et al. 2021): h = W x + scaling * B A x, with W frozen, A [rank, in] random and B [out, rank] zero at first.

`LoRALinear` wraps an `nn.Linear`, a 4-bit linear or GPT-2's `Conv1D` and keeps its weights unchanged; `LoRAConv` and
`LoRAEmbedding` wrap convolutions and embeddings. `adapt` wraps every target layer of a model. A and B are bf16; the
optimizer keeps the bits that bf16 rounds away.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.adapter import trained_parts
from qlora.adapter.adapted_layer import AdaptedLayer, layer_class
from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.config import CONFIG_FILE, check_config, config_of, read_config, spec_of_layer, targets_in
from qlora.adapter.experts import restore_experts, use_expert_stacks
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import InitialValues, start_values
from qlora.adapter.lora_conv import LoRAConv
from qlora.adapter.lora_embedding import LoRAEmbedding
from qlora.adapter.lora_experts import LoRAExperts
from qlora.adapter.lora_spec import FROM_WEIGHTS, LoraSpec
from qlora.adapter.low_rank_layer import LowRankLayer, initial_a
from qlora.adapter.methods.course import Course
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.patterns import fits
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B, read_pairs
from qlora.adapter.targets import features, select
from qlora.adapter.wrap import wrap
from qlora.errors import ModelError, UsageError, listed
from qlora.ops.dropout import draw
from qlora.ops.lora_linear import lora_linear
from qlora.ops.products import Linear, Update
from qlora.quantization.expert_stack import ExpertStack, expert_stacks
from qlora.quantization.nf4 import use_nf4_linears
from qlora.recipe import Adapter


class LoRALinear(LowRankLayer, AdaptedLinear):
    """A frozen linear with a trainable low-rank update (Hu et al. 2021).

    The layer maps x [..., in] to W x + bias + scaling * B A x, [..., out] in x.dtype.

    Args:
        base: an `nn.Linear`, 4-bit linear or `Conv1D`. It is frozen in place; its bias stays in use.
        spec: rank, alpha, dropout, scaling, initialisation and dtype; None means the defaults of `LoraSpec`.
        generator: CPU generator that A is drawn from; None means torch's default generator.

    Raises:
        ModelError: `base` is not a linear layer.

    Examples:
        >>> layer = LoRALinear(nn.Linear(input_dim, output_dim), LoraSpec(rank=4, alpha=8))
    """

    SAVED: ClassVar = {SUFFIX_A: "lora_a", SUFFIX_B: "lora_b"}

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec)
        device = self.base.weight.device
        a = initial_a(self.spec.init, (self.spec.rank, self.in_features), device, generator)
        self.lora_a = nn.Parameter(a.to(device, self.spec.dtype))
        self.lora_b = nn.Parameter(
            torch.zeros(self.out_features, self.spec.rank, device=device, dtype=self.spec.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return lora_linear(x, *self.product())

    def product(self) -> tuple[Linear, Update]:
        """Return the arguments of `qlora.ops` for this layer, with the next dropout mask if it is training."""
        weight, state = self.frozen
        dropout = draw(self.dropout if self.training else 0.0, self.number)
        return Linear(weight, state, self.base.bias, self.scaling, dropout), Update(self.lora_a, self.lora_b)

    @classmethod
    def shapes(cls, linear: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A [rank, in] and B [out, rank]."""
        in_features, out_features = features(linear)
        return {SUFFIX_A: (spec.rank, in_features), SUFFIX_B: (out_features, spec.rank)}

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense weight W + scaling * B A, so that a plain linear computes the same without dropout.

        The sum is computed in fp32, or in fp64 if an operand is fp64, independent of the dtypes of W, A and B. NF4
        weights are dequantized to fp32, which represents them exactly. So the result has only fp32's rounding error
        until the caller rounds it to 16 or 4 bits.

        Args:
            weight: dense weight [out, in] to add the update to; None means the layer's own frozen weight, dequantized
                if it is 4-bit.

        Returns:
            The weight [out, in] in fp32 or fp64, on the device of `weight`.

        Examples:
            >>> y = torch.nn.functional.linear(x, layer.merged_weight(), layer.base.bias)
        """
        if weight is None:
            weight, a, b = self.wide(self.base.weight, self.frozen[1])
            weight = weight.T if self.fan_in_fan_out else weight
        else:
            weight, a, b = self.wide(weight)
        assert weight.shape == (self.out_features, self.in_features), (
            f"{weight.shape} is not the layer's shape"
        )
        return torch.addmm(weight, b, a, alpha=self.scaling)


LAYERS: tuple[type[LowRankLayer], ...] = (LoRALinear, LoRAExperts, LoRAConv, LoRAEmbedding)
"""classes of LoRA's layers: for linears, experts, convolutions and embeddings"""


class Lora(AdapterMethod):
    """LoRA: trains A and B of every target."""

    name = "lora"
    peft_type = "LORA"
    layers = LAYERS
    why_no_sum: ClassVar[str | None] = None

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Adapt `model` with the recipe's settings; see `adapt`."""
        return adapt(model, spec_of(settings), seed=seed)

    def initial_values(self, settings: Adapter, seed: int) -> InitialValues | None:
        """Return the reader of the base's weights that `init: pissa` and `init: loftq` need."""
        if settings.init not in FROM_WEIGHTS:
            return None
        return InitialValues(spec_of(settings), seed, beside=settings.train_modules)

    def notes(self, model: nn.Module) -> list[str]:
        """Return the distance from the 16-bit base at the start, if A and B come from its weights."""
        values = InitialValues.of(model)
        return [] if values is None else [values.note]

    def course(self, model: nn.Module, settings: Adapter, total_steps: int) -> Course:
        """Return a course that only reports the distance from the 16-bit base at the start."""
        return _Start(InitialValues.of(model))

    def lr_factor(self, parameter: str, settings: Adapter) -> float:
        """Return `lr_ratio` for B and 1 for A (LoRA+, Hayou et al. 2024, section 5): eta_B = lr_ratio * eta_A."""
        return settings.lr_ratio if parameter.endswith("lora_b") else 1.0

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Return the fields of PEFT's LoraConfig."""
        return config_of(model, layers, base)

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if a field is unknown or not supported."""
        check_config(config, file)

    def as_lora(self, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Read config and tensors."""
        config = read_config(folder / CONFIG_FILE)
        suffixes = [suffix for kind in self.layers for suffix in kind.SAVED]
        return config, read_pairs(folder, trained_parts.part_names(folder, config, suffixes))

    def targets(
        self, model: nn.Module, config: Mapping[str, Any], stored: Mapping[str, Any], file: Path
    ) -> list[str]:
        """Return the target layers, chosen as in PEFT."""
        return targets_in(model, config, stored, file, self.adapts)

    def spec(self, config: Mapping[str, Any], name: str, file: Path) -> LoraSpec:
        """Return the settings of the layer `name`; missing fields have PEFT's defaults."""
        return spec_of_layer(config, name, file)


class _Start(Course):
    """Course that only reports where the training started."""

    def __init__(self, values: InitialValues | None) -> None:
        self._distances = values.distances if values is not None and values.layers else None

    def outcome(self) -> dict[str, Any]:
        """Return the distances from the 16-bit base at the start, if they were measured."""
        return {} if self._distances is None else {"distance_from_16_bit": self._distances.as_json()}


def spec_of(settings: Adapter) -> LoraSpec:
    """Return the LoRA settings of a recipe's section `adapter`."""
    return LoraSpec(
        rank=settings.rank,
        alpha=settings.resolved_alpha,
        dropout=settings.dropout,
        scaling=settings.scaling,
        init=settings.init,
        expert_rank=settings.expert_rank,
        targets=settings.targets,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )


def adapt(
    model: nn.Module,
    spec: LoraSpec | None = None,
    *,
    seed: int = 0,
    train_modules: Sequence[str] = (),
    layers: Sequence[type[LowRankLayer]] = LAYERS,
) -> nn.Module:
    """Freeze `model` and wrap its target layers in `LoRALinear`, `LoRAConv` or `LoRAEmbedding`, in place.

    The initial A of a layer depends only on the seed and the layer's name, not on the device or the other targets.
    `init` pissa takes A and B from the weights of `model` and changes them; it needs plain weights.

    Args:
        model: any `nn.Module` with linear layers, convolutions or embeddings, also on the meta device.
        spec: LoRA settings, with the targets; None means the defaults of `LoraSpec`.
        seed: seed of the initial A of each layer.
        train_modules: modules trained as a whole beside the adapter, such as a new head: names, last parts of names, or
            regular expressions. They are saved with the adapter, and all-linear and attention leave them out.
        layers: classes of the adapted layers; the first one that is for a target's kind of layer adapts it.

    Returns:
        The same model.

    Raises:
        ModelError: the model has an adapter already, `init` needs 16-bit weights that it does not have, or a module of
            `train_modules` cannot be trained.
        UsageError: the targets, a pattern or an entry of `train_modules` match nothing, or a layer on which LoRA or
            `init` is not defined.

    Examples:
        >>> model = adapt(model, LoraSpec(rank=16, targets="all-linear"))
    """
    spec = spec or LoraSpec()
    if AdaptedLayer.of(model):
        raise ModelError(
            "the model has an adapter already: adapt a base without one, or load an adapter with load_adapter"
        )

    spec, names = _with_targets(model, spec, train_modules, layers)
    values = start_values(model, spec, seed)
    use_nf4_linears(model.requires_grad_(False))
    modules = {name: model.get_submodule(name) for name in names}
    drawn = replace(spec, init="kaiming") if spec.init in FROM_WEIGHTS else spec
    adapted = {
        name: layer_class(layers, module)(module, _spec_for(drawn, name, module), layer_generator(seed, name))
        for name, module in modules.items()
    }
    if values is not None:
        values.fill(adapted)
    return trained_parts.train_modules(wrap(model, adapted), train_modules)


def _with_targets(
    model: nn.Module, spec: LoraSpec, train_modules: Sequence[str], layers: Sequence[type[LowRankLayer]]
) -> tuple[LoraSpec, list[str]]:
    """Return the settings with targets beside `train_modules`, and the names of the target layers, all checked.

    The experts among the targets become modules of ours.
    """
    if LoRAExperts in layers:
        use_expert_stacks(model)

    def can_adapt(module: nn.Module) -> bool:
        return any(kind.adapts(module) for kind in layers)

    targets = trained_parts.targets_beside(model, spec.targets, train_modules, can_adapt)
    spec, names = replace(spec, targets=targets), select(model, targets, can_adapt)
    restore_experts(model, names)
    _check_patterns(spec, names)
    if spec.expert_rank is not None and not set(names) & expert_stacks(model).keys():
        raise UsageError(
            "expert_rank: none of the targets is a projection of experts; leave it out, or target experts"
        )
    for name in names:
        _check_target(name, model.get_submodule(name), spec, layers)
    return spec, names


def _spec_for(spec: LoraSpec, name: str, module: nn.Module) -> LoraSpec:
    """Return the settings of the layer `name`; experts have a rank of their own."""
    if isinstance(module, ExpertStack):
        rank = spec.expert_rank or max(1, spec.rank // max(1, module.active))
        spec = replace(spec, rank=rank, alpha=spec.resolved_alpha)
    return spec.for_layer(name)


def _check_patterns(spec: LoraSpec, names: list[str]) -> None:
    """Raise UsageError if a key of a pattern matches none of the targets."""
    for key in [*spec.rank_pattern, *spec.alpha_pattern]:
        if not any(fits(key, name) for name in names):
            pattern = "rank_pattern" if key in spec.rank_pattern else "alpha_pattern"
            raise UsageError(
                f'adapter.{pattern}: "{key}" matches no targeted layer; the targets are {listed(names)}'
            )


def _check_target(name: str, module: nn.Module, spec: LoraSpec, layers: Sequence[type[LowRankLayer]]) -> None:
    """Raise UsageError if the adapted layers or the initialisation are not defined on a target."""
    kind = layer_class(layers, module)
    if (reason := kind.why_unsuitable(module)) is not None:
        raise UsageError(f"targets: LoRA is not defined on {name}: {reason}")
    if spec.init in FROM_WEIGHTS and kind is not LoRALinear:
        raise UsageError(
            f"init {spec.init} is defined for LoRA's linear layers, and {name} is another layer; leave it out of the "
            "targets, or use another init"
        )
    if spec.init == "orthogonal" and kind is LoRAEmbedding:
        raise UsageError(
            f"init orthogonal draws A, and {name} is an embedding, where B is drawn; use gaussian"
        )


def lora_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return the LoRA layers of `model` by name, in the order of the model.

    Args:
        model: a model, adapted or not.

    Returns:
        The layers by name; empty for a model without LoRA.

    Examples:
        >>> sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in lora_layers(model).values())
    """
    return LowRankLayer.of(model)


def lora_parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """Return the trainable parameters of one adapted layer: rank * (in + out), for A and B."""
    return rank * (in_features + out_features)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and the layer's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
