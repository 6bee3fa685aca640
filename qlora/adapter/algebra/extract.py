"""The low-rank difference of two full checkpoints: an adapter that makes one out of the other, nearly.

Layer by layer, tensor by tensor: no more of either checkpoint stands in memory than one weight. The best rank-k
approximation of a difference is its truncated singular value decomposition (Eckart and Young 1936), found by
subspace iteration on a random sketch (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), as a full
decomposition of a 7B model would take hours. Errors are not estimates: each is measured on the whole difference.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.algebra.compose import ApproximationError
from qlora.adapter.algebra.low_rank import ROUNDING, LowRank
from qlora.adapter.algebra.tensors import Adapter, Layer
from qlora.adapter.config import targets_of
from qlora.adapter.methods.lora import layer_generator
from qlora.adapter.targets import is_conv1d, select
from qlora.errors import ModelError
from qlora.runtime.device import device_named
from qlora.storage.safetensors_files import ShardReader

OVERSAMPLING = 16
"""Sketch columns beyond those that are used: the last are not exact."""

ITERATIONS = 4
"""Of the subspace; each sharpens the spectrum by two powers."""

PART = 2**24
"""Elements compared at a time where only the norm is wanted."""

SMALL = 512
"""Up to this many rows or columns a matrix is decomposed whole, in float64."""


@dataclass(frozen=True)
class Extraction:
    """The adapter, each layer's deviation from the difference, and what changed but no adapter holds.

    not_captured: tensor name -> Frobenius norm of its difference; None where one checkpoint lacks it or its
        shape differs.
    """

    adapter: Adapter
    deviations: dict[str, ApproximationError]
    not_captured: dict[str, float | None]


def extract(
    tuned: ShardReader,
    base: ShardReader,
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    progress: Callable[[Sequence[str]], Iterable[str]] = list,
) -> Extraction:
    """The adapter of at most `rank`, or of the least that keeps `energy` (0-1), for tuned - base.

    model: the architecture, on the meta device will do; its linear layers but the head are compared, and those
        that do not differ get no adapter. device: auto, cpu or cuda. progress: sees the layers' names go by.
    Raises ModelError if a linear weight is missing, quantized or of other shapes, or none differs; UsageError if
    there is no CUDA device.
    """
    place = device_named(device)
    keys = {name: _keys(name, model, tuned, base) for name in select(model, "all-linear")}
    layers, deviations = {}, {}
    for name in progress(list(keys)):
        ours, theirs = keys[name]
        difference = _difference(tuned[ours].to(place), base[theirs].to(place))
        norm = _norm(difference)
        if not math.isfinite(norm):
            raise ModelError(f"{tuned.folder} or {base.folder}: {ours} holds numbers that are not finite")
        if norm == 0:
            continue
        layer = Layer.store(name, _nearest(difference, rank, energy, name), dtype)
        left = difference - layer.scaling * (layer.b.to(difference) @ layer.a.to(difference))
        deviations[name] = ApproximationError(layer.rank, norm, _norm(left))
        layers[name] = Layer(layer.a.cpu(), layer.b.cpu(), layer.alpha, layer.scaling)
    if not layers:
        raise ModelError(
            f"{tuned.folder} and {base.folder} have the same linear weights: there is nothing to extract"
        )
    adapter = Adapter(_config(model, layers, base_model), layers)
    used = {key for pair in keys.values() for key in pair}
    return Extraction(adapter, deviations, _not_captured(tuned, base, used))


def _keys(layer: str, model: nn.Module, tuned: ShardReader, base: ShardReader) -> tuple[str, str]:
    """Where the two checkpoints keep a layer's weight: checked for all layers before anything is computed."""
    module = model.get_submodule(layer)
    if is_conv1d(module):
        raise ModelError(f"{layer} is a Conv1D, as GPT-2 has it: extract reads plain linear layers only")
    assert isinstance(module, nn.Linear)
    shape = module.out_features, module.in_features
    found = []
    for weights in (tuned, base):
        stored = weights.of_layer(layer)
        if stored is None:
            raise ModelError(
                f"{weights.folder}: has no {layer}.weight, as the architecture of {tuned.folder} has"
            )
        if stored.is_quantized:
            raise ModelError(
                f"{weights.folder}: {stored.name} is quantized: give both checkpoints in 16 or 32 bits"
            )
        if stored.shape != shape:
            raise ModelError(
                f"{weights.folder}: {stored.name} is {list(stored.shape)}, and {list(shape)} in the architecture of "
                f"{tuned.folder}"
            )
        found.append(stored.name)
    return found[0], found[1]


def _difference(tuned: Tensor, base: Tensor) -> Tensor:
    """tuned - base [out, in]: in float64 where that is quick, else in float32."""
    dtype = torch.float64 if min(tuned.shape) <= SMALL else torch.float32
    return tuned.to(dtype) - base.to(dtype)


def _nearest(difference: Tensor, rank: int | None, energy: float | None, name: str) -> LowRank:
    """The truncated decomposition of `difference` [out, in]; the sketch grows until it holds the energy."""
    short = min(difference.shape)
    wanted = (energy or 0.0) * _norm(difference) ** 2 * (1 - ROUNDING)
    size = (rank or OVERSAMPLING) + OVERSAMPLING
    while True:
        whole = short <= SMALL or 2 * size >= short
        u, s, vh = (
            torch.linalg.svd(difference, full_matrices=False) if whole else _sketch(difference, size, name)
        )
        kept = s.double().square().cumsum(0)  # what the sketch does not see counts as lost
        if whole or rank is not None or kept[-OVERSAMPLING] >= wanted:
            return LowRank.truncated(u, s, vh, rank or int((kept < wanted).sum()) + 1)
        size *= 2


def _sketch(matrix: Tensor, size: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `size` singular triples of `matrix` [out, in], nearly; always the same for one layer."""
    random = torch.randn(matrix.shape[1], size, generator=layer_generator(0, name))
    q = _orthonormal(matrix @ random.to(matrix))
    for _ in range(ITERATIONS):
        q = _orthonormal(matrix @ _orthonormal(matrix.T @ q))
    # matrix is nearly Q (Q^T matrix), a product of two thin ones
    return LowRank.of(q, q.T @ matrix).svd()


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _norm(matrix: Tensor) -> float:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()


def _config(model: nn.Module, layers: Mapping[str, Layer], base_model: str | None) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "target_modules": targets_of(model, layers),  # it asks for names alone
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    }


def _not_captured(tuned: ShardReader, base: ShardReader, used: set[str]) -> dict[str, float | None]:
    """Tensors that are no adapted linear weight and differ."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys([*tuned, *base]):
        if name in used:
            continue
        if name not in tuned or name not in base or tuned.stored[name].shape != base.stored[name].shape:
            found[name] = None
        elif norm := _distance(tuned[name], base[name]):
            found[name] = norm
    return found


def _distance(tuned: Tensor, base: Tensor) -> float:
    """|tuned - base|, in float64 a part at a time: an embedding may be the largest tensor of all."""
    pairs = zip(tuned.reshape(-1).split(PART), base.reshape(-1).split(PART), strict=True)
    return math.hypot(*(_norm(ours.double() - theirs.double()) for ours, theirs in pairs))
