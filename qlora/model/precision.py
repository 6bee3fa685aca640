"""Share of a base's linear weights that is in NF4, and what the other weights are.

Loading quantizes `nn.Linear` itself and the experts with transformers' interface. The layers of other classes keep 16
bits, so such a base takes far more memory than its number of parameters suggests. The input embedding and the output
head are never quantized and not counted.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.targets import features, heads, is_conv1d
from qlora.errors import ModelError
from qlora.quantization.expert_stack import ExpertStack, is_experts
from qlora.quantization.nf4 import is_nf4
from qlora.quantization.read_weights import read_layers
from qlora.quantization.routers import routers
from qlora.recipe import Base
from qlora.recipe.sizes import parameters_text

ENOUGH = 0.5
"""smallest share of the linear weights in NF4 with which a run starts unasked"""

EXPERTS = "experts without the interface of transformers' experts"
STORED = "experts that the checkpoint excludes"
OTHERS = "weights that are in no linear layer"
SKIPPED = "layers that the model or its checkpoint excludes"
ROUTERS = "routers of experts"
READ = "layers whose weight the model reads"


@dataclass(frozen=True)
class Precision:
    """Numbers of linear weights of a base: in NF4, and not quantized for a reason."""

    quantized: int
    """weights in NF4"""
    kept: Mapping[str, int]
    """kind of layer -> weights that are not quantized, the most first"""

    @property
    def linear_parameters(self) -> int:
        """All linear weights, without the input embedding and the output head."""
        return self.quantized + sum(self.kept.values())

    @property
    def share(self) -> float:
        """Share of the linear weights in NF4, from 0 to 1; 1 for a base without linear weights."""
        return self.quantized / self.linear_parameters if self.linear_parameters else 1.0

    def line(self) -> str:
        """Return the precision of the base in one line."""
        total = f"{parameters_text(self.linear_parameters)} linear weights"
        if not self.kept:
            return f"all {total} are in NF4"
        if not self.quantized:
            unusual = {
                kind: number
                for kind, number in self.kept.items()
                if kind not in (SKIPPED, STORED, ROUTERS, READ)
            }
            return f"none of the {total} are in NF4" + (f": {_listed(unusual)}" if unusual else "")
        return (
            f"{percent(self.share)} of the {total} are in NF4; "
            f"{percent(1 - self.share)} are not quantized: {_listed(self.kept)}"
        )


def precision_of(model: nn.Module, quantized: Collection[str] | None = None) -> Precision:
    """Count the linear weights of a base by precision.

    Args:
        model: the model, with an adapter or without; real, fake or on the meta device.
        quantized: names of the linear layers and of the experts' parameters that loading will quantize, for a model
            that is not quantized yet; None for a model as it is.

    Examples:
        >>> precision_of(model).line()
        'all 6.48 B linear weights are in NF4'
    """
    apart, routing, read = heads(model), routers(model), read_layers(model)
    numbers: Counter[str | None] = Counter()
    for name, module in model.named_modules():
        if name.removesuffix(".base") in apart or isinstance(
            module, nn.Embedding
        ):  # .base: under trained rows
            continue
        if is_nf4(module) or isinstance(module, nn.Linear) or is_conv1d(module):
            in_nf4 = is_nf4(module) if quantized is None else name in quantized
            inputs, outputs = features(module)
            numbers[None if in_nf4 else _kind(name, module, routing, read)] += inputs * outputs
        elif isinstance(module, ExpertStack):
            numbers[None if module.packed else STORED] += module.numel()
        elif name not in routing and not isinstance(module, _ConvNd | AdaptedLayer):
            known = is_experts(module)
            experts = _among_experts(name) or "experts" in type(module).__name__.lower()
            dimensions = 2 if _among_experts(name) else 3
            for own, weight in module.named_parameters(recurse=False):
                if f"{name}.{own}" in (quantized or ()):
                    numbers[None] += weight.numel()
                elif weight.ndim >= dimensions and min(weight.shape[-2:]) > 1 and not own.endswith("bias"):
                    kind = STORED if known else EXPERTS if experts else OTHERS
                    numbers[kind] += weight.numel()
    in_nf4_count = numbers.pop(None, 0)
    return Precision(in_nf4_count, dict(numbers.most_common()))  # type: ignore[arg-type]


def check_precision(base: Base, precision: Precision) -> None:
    """Check that at least half of the linear weights of an NF4 base are in NF4, unless the recipe allows less.

    Raises:
        ModelError: less than half are, and `base.allow_unquantized` is false.
    """
    if base.quantization != "nf4" or base.allow_unquantized or precision.share >= ENOUGH:
        return
    experts = ", and experts get no adapter" if EXPERTS in precision.kept else ""
    raise ModelError(
        f"base.quantization: nf4 quantizes little of {base.model!r}: {precision.line()}. These weights stay in 16 bits"
        f"{experts}. Set base.allow_unquantized=true to train the base like this, or base.quantization=none"
    )


def percent(share: float) -> str:
    """Return a share as a percentage that is 0% or 100% only if it is exactly that."""
    rounded = f"{100 * share:.1f}".removesuffix(".0")
    if rounded in ("0", "100") and share not in (0.0, 1.0):
        return "over 99.9%" if share > 0.5 else "under 0.1%"
    return f"{rounded}%"


def _listed(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{parameters_text(number)} in {kind}" for kind, number in kinds.items())


def _kind(name: str, module: nn.Module, routing: Collection[str], read: Collection[str]) -> str:
    if name in routing:
        return ROUTERS
    if name in read:
        return READ
    plain = type(module) is nn.Linear or is_conv1d(module)
    return SKIPPED if plain else f"layers of the class {type(module).__name__}"


def _among_experts(name: str) -> bool:
    return any("experts" in part for part in name.split("."))
