"""Weighted sums of adapters, and adapters of lower rank; both measure their error against the exact result.

The sum of updates w_i * scaling_i * B_i A_i equals B A, where A stacks the A_i and B puts the w_i * scaling_i * B_i
side by side. So the ranks add up, and nothing is approximated. If the A_i are bf16, fp16 or fp32, A is exact in
float32. Rounding changes an element of B by a relative error of at most 2^-24 in float32, and of 2^-9 in bf16.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch

from qlora.adapter.algebra.low_rank import LowRank
from qlora.adapter.algebra.tensors import Adapter, Layer
from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity
from qlora.adapter.peft_experts import FIELD, is_projection, targets_of
from qlora.adapter.peft_parameters import is_parameter
from qlora.errors import ModelError, listed

CANCELLED = 1e-5
"""norm of a sum over that of its terms up to which rounding explains all of it"""


@dataclass(frozen=True)
class ApproximationError:
    """Error of a layer's stored update against the requested update."""

    rank: int
    """rank of the stored update"""
    norm: float
    """Frobenius norm of the requested update"""
    error: float
    """Frobenius norm of the difference between both"""

    @property
    def relative(self) -> float:
        """error / norm; 0 for a zero update."""
        return self.error / self.norm if self.norm else 0.0

    @classmethod
    def between(cls, layer: Layer, exact: LowRank) -> "ApproximationError":
        """Measure the error of a stored layer against the exact update."""
        return cls(layer.rank, exact.norm(), (layer.update - exact).norm())


def relative_error(deviations: Iterable[ApproximationError]) -> float:
    """Return the error of all layers together: the norm of all errors over the norm of all requested updates."""
    errors = list(deviations)
    error, norm = math.hypot(*(d.error for d in errors)), math.hypot(*(d.norm for d in errors))
    return error / norm if norm else 0.0


def compose(
    parts: Sequence[tuple[Adapter, float]],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    any_base: bool = False,
) -> tuple[Adapter, dict[str, ApproximationError]]:
    """Return the weighted sum of the updates of several adapters, and the error of each stored layer.

    Args:
        parts: adapters with their weights; a negative weight subtracts. Adapters can differ in ranks and layers. The
            result takes its config and extra_files from the first one.
        rank: highest rank of each layer; the layer is then the best approximation of that rank.
        energy: share of the squared singular values to keep (0-1); each layer then gets the lowest such rank. Without
            `rank` and `energy` the sum is exact, apart from rounding to `dtype`.
        dtype: dtype of A and B in the result.
        any_base: combine the adapters even if they were trained on different bases.

    Returns:
        The new adapter, and the error of each layer by name.

    Raises:
        ModelError: the adapters were trained on different bases, a layer has different shapes in them, their experts
            have different layouts, or one of several has tokens or modules trained beside it.
    """
    adapters = [adapter for adapter, _ in parts]
    if not any_base:
        _check_bases(adapters)
    _check_parts(adapters)
    _check_experts(adapters)
    layers, deviations = {}, {}
    most = 0.0  # norm of the sum if no term cancelled another
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        terms = [weight * adapter.layers[name].update for adapter, weight in parts if name in adapter.layers]
        alike = [adapter.layers[name] for adapter in adapters if name in adapter.layers]
        _check_shapes(name, terms, alike)
        exact = reduce(add, terms)
        most = math.hypot(most, sum(term.norm() for term in terms))
        full = rank is None and energy is None
        layers[name] = Layer.store(name, exact if full else exact.nearest(rank, energy), dtype, alike[0])
        deviations[name] = ApproximationError.between(layers[name], exact)
    parameters = list(dict.fromkeys(entry for adapter in adapters for entry in targets_of(adapter.config)))
    config = {**adapters[0].config, "target_modules": _targets(adapters, parameters)}
    if parameters:
        config[FIELD] = parameters
    notes = dict.fromkeys(adapter.note for adapter in adapters if adapter.note)
    if len(parts) > 1 and math.hypot(*(found.norm for found in deviations.values())) <= CANCELLED * most:
        notes["the updates cancel each other, so the new adapter changes nothing"] = None
    return replace(adapters[0], config=config, layers=layers, note="; ".join(notes) or None), deviations


def compress(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, dict[str, ApproximationError]]:
    """Return the best approximation of an adapter by lower ranks, optimal in each layer (Eckart and Young 1936).

    Args:
        adapter: the adapter to approximate.
        rank: highest rank of each layer.
        energy: share of the squared singular values to keep (0-1); each layer then gets the lowest such rank.
        dtype: dtype of A and B in the result; None means the widest dtype in the adapter.

    Returns:
        The new adapter, and the error of each layer by name.
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
            f"the adapters were trained on different bases: {' and '.join(bases)}. Combine adapters of one base, "
            "or use --any-base if these bases have the same weights"
        )
    identities = [
        BaseIdentity.parse(adapter.extra_files[IDENTITY_FILE])
        for adapter in adapters
        if IDENTITY_FILE in adapter.extra_files
    ]
    for other in identities[1:]:
        if (difference := identities[0].difference(other)) is not None:
            raise ModelError(
                f"the adapters were trained on different bases, which differ in {difference}. Combine adapters "
                "of one base, or allow different bases with --any-base"
            )


def _check_parts(adapters: Sequence[Adapter]) -> None:
    if len(adapters) > 1 and (parts := [name for adapter in adapters for name in adapter.parts]):
        raise ModelError(
            f"an adapter has tokens or modules trained beside it ({listed(parts)}). They replace those of the base, "
            "so a weighted sum has no meaning; combine adapters without them, or merge this one into its base first"
        )


def _check_experts(adapters: Sequence[Adapter]) -> None:
    """Raise ModelError if some adapters have A and B for all experts, and others for each."""
    apart = any(adapter.has_experts_apart for adapter in adapters)
    if apart and any(adapter.experts for adapter in adapters):
        raise ModelError(
            "an adapter has A and B for each matrix of each expert, as `qlora adapter export` writes them, and another "
            "one for all experts of a layer. Combine the adapters from which they were exported"
        )


def _check_shapes(name: str, terms: Sequence[LowRank], layers: Sequence[Layer]) -> None:
    if len(kinds := {(layer.kernel, layer.suffixes) for layer in layers}) > 1:
        forms = " and ".join(
            f"a convolution with kernel {list(kernel)}" if kernel else f"a layer with {suffix.lstrip('.')}"
            for kernel, (suffix, _) in sorted(kinds)
        )
        raise ModelError(
            f"{name} is {forms} in different adapters: their bases differ in architecture. Combine adapters of one base"
        )
    shapes = list(dict.fromkeys((*term.b.shape[:-1], term.a.shape[-1]) for term in terms))
    if len(shapes) > 1:
        sizes = " and ".join(str(list(shape)) for shape in shapes)
        raise ModelError(
            f"{name} is {sizes} in different adapters: their bases differ in architecture. Combine adapters of one base"
        )


def _targets(adapters: Sequence[Adapter], parameters: Sequence[str]) -> Any:
    """Return target_modules that match exactly the layers of all adapters in PEFT but those named as parameters."""
    targets: list[Any] = [adapter.config.get("target_modules") for adapter in adapters]
    if all(entry == targets[0] for entry in targets):
        return targets[0]
    if all(isinstance(entry, list) for entry in targets):
        return sorted({name for entry in targets for name in entry})
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    others = [x for x in names if not is_projection(x, parameters) and not is_parameter(x, parameters)]
    return "|".join(map(re.escape, others))
