"""Weighted sums of adapters, and adapters of lower rank; both say how far they are from what was asked.

The sum of updates w_i * scaling_i * B_i A_i is B A with A = the A_i stacked and B = the w_i * scaling_i * B_i
side by side, so the rank is the sum of the ranks and nothing is approximated. In float32 A is exact where the
A_i are bf16, fp16 or fp32, and an element of B is off by at most 2^-24 of itself; in bf16 by 2^-9.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch

from qlora.adapter.algebra.low_rank import LowRank
from qlora.adapter.algebra.tensors import Adapter, Layer
from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity
from qlora.errors import ModelError


@dataclass(frozen=True)
class ApproximationError:
    """What a layer stores beside what was asked: the Frobenius norms of that, and of the difference."""

    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """error / norm; of an update of nothing, 0."""
        return self.error / self.norm if self.norm else 0.0

    @classmethod
    def between(cls, layer: Layer, asked: LowRank) -> "ApproximationError":
        """Of the layer as stored from the update that was asked for."""
        return cls(layer.rank, asked.norm(), (layer.update - asked).norm())


def relative_error(deviations: Iterable[ApproximationError]) -> float:
    """Of all layers together: the norm of all errors over the norm of all that was asked."""
    found = list(deviations)
    error, norm = math.hypot(*(d.error for d in found)), math.hypot(*(d.norm for d in found))
    return error / norm if norm else 0.0


def compose(
    parts: Sequence[tuple[Adapter, float]],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    any_base: bool = False,
) -> tuple[Adapter, dict[str, ApproximationError]]:
    """The weighted sum of the updates of adapters, and each layer's deviation from it as stored in `dtype`.

    A negative weight subtracts. Adapters may differ in ranks and layers. `rank` or `energy` (0-1) makes each
    layer the best approximation of that rank, or of the least rank that keeps that share of the squared
    singular values. Config and extra_files are those of the first adapter.

    Raises ModelError if the adapters name different bases (unless `any_base`), or a layer has other shapes
    in one than in another.
    """
    adapters = [adapter for adapter, _ in parts]
    if not any_base:
        _check_bases(adapters)
    layers, deviations = {}, {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        terms = [weight * adapter.layers[name].update for adapter, weight in parts if name in adapter.layers]
        _check_shapes(name, terms)
        asked = reduce(add, terms)
        exact = rank is None and energy is None
        layers[name] = Layer.store(name, asked if exact else asked.nearest(rank, energy), dtype)
        deviations[name] = ApproximationError.between(layers[name], asked)
    config = {**adapters[0].config, "target_modules": _targets(adapters)}
    return Adapter(config, layers, adapters[0].extra_files), deviations


def compress(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, dict[str, ApproximationError]]:
    """The best approximation of an adapter of at most `rank`, or of the least that keeps `energy` (0-1).

    It is optimal layer by layer (Eckart and Young 1936). `dtype` None: the widest that the adapter has.
    """
    if dtype is None:
        dtype = reduce(
            torch.promote_types, (x.dtype for layer in adapter.layers.values() for x in (layer.a, layer.b))
        )
    return compose([(adapter, 1.0)], rank=rank, energy=energy, dtype=dtype)


def _check_bases(adapters: Sequence[Adapter]) -> None:
    bases = list(dict.fromkeys(adapter.base for adapter in adapters if adapter.base))
    if len(bases) > 1:
        raise ModelError(
            f"the adapters were trained on different bases: {' and '.join(bases)}. If those hold the same "
            "weights, say so with --any-base"
        )
    identities = [
        BaseIdentity.parse(adapter.extra_files[IDENTITY_FILE])
        for adapter in adapters
        if IDENTITY_FILE in adapter.extra_files
    ]
    for other in identities[1:]:
        if (difference := identities[0].difference(other)) is not None:
            raise ModelError(
                f"the adapters were trained on different bases ({difference}). To combine them all the same, say "
                "--any-base"
            )


def _check_shapes(name: str, terms: Sequence[LowRank]) -> None:
    shapes = list(dict.fromkeys((term.b.shape[0], term.a.shape[1]) for term in terms))
    if len(shapes) > 1:
        sizes = " and ".join(f"[{out}, {into}]" for out, into in shapes)
        raise ModelError(f"{name} is {sizes} in different adapters: they are not of one architecture")


def _targets(adapters: Sequence[Adapter]) -> Any:
    """What means exactly the layers of all to PEFT. A list means what each of its entries means."""
    targets: list[Any] = [adapter.config.get("target_modules") for adapter in adapters]
    if all(entry == targets[0] for entry in targets):
        return targets[0]
    if all(isinstance(entry, list) for entry in targets):
        return sorted({name for entry in targets for name in entry})
    return "|".join(dict.fromkeys(re.escape(name) for adapter in adapters for name in adapter.layers))
