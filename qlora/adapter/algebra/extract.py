"""Extraction of an adapter from two full checkpoints, as the low-rank approximation of their difference.

Only one weight of each checkpoint is in memory at a time. The best rank-k approximation of a difference is its
truncated singular value decomposition (Eckart and Young 1936). We compute it by subspace iteration on a random sketch
(Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), because full decompositions of a 7B model would take hours.
Errors are not estimates: each is measured on the whole difference.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.algebra.compose import ApproximationError
from qlora.adapter.algebra.low_rank import OVERSAMPLING, ROUNDING, SMALL, LowRank, sketch
from qlora.adapter.algebra.tensors import Adapter, Layer
from qlora.adapter.config import target_fields
from qlora.adapter.methods.lora import layer_generator
from qlora.adapter.targets import is_conv1d, select
from qlora.errors import ModelError
from qlora.runtime.device import device_named
from qlora.storage.safetensors_files import ShardReader

PART = 2**24
"""Elements compared at a time for the norm of a difference."""


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter with its errors and the changes that it cannot represent."""

    adapter: Adapter
    deviations: dict[str, ApproximationError]
    """error of each layer against the difference of the checkpoints"""
    not_captured: dict[str, float | None]
    """Frobenius norm of the difference of every other changed tensor, by name; None if a checkpoint lacks the tensor or
    the shapes differ"""


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
    """Extract an adapter that approximates tuned - base in every linear layer except the output head.

    Layers without a difference get no adapter.

    Args:
        tuned: the fine-tuned checkpoint.
        base: the checkpoint that it was tuned from.
        model: the architecture of both, also on the meta device.
        rank: highest rank of each layer.
        energy: share of the squared singular values to keep (0-1); each layer then gets the lowest such rank.
        base_model: name of the base to record in the config.
        dtype: dtype of A and B in the adapter.
        device: where the decompositions run: auto, cpu, cuda or cuda:N.
        progress: wraps the sequence of layer names, for example in a progress bar.

    Raises:
        ModelError: a linear weight is missing, quantized, not finite or of another shape, or no weight differs.
        UsageError: there is no CUDA device.
    """
    place = device_named(device)
    keys = {name: _keys(name, model, tuned, base) for name in select(model, "all-linear")}
    layers, deviations = {}, {}
    for name in progress(list(keys)):
        ours, theirs = keys[name]
        difference = _difference(tuned[ours].to(place), base[theirs].to(place))
        norm = _norm(difference)
        if not math.isfinite(norm):
            raise ModelError(
                f"{tuned.folder} or {base.folder}: {ours} holds numbers that are not finite. Restore the file"
            )
        if norm == 0:
            continue
        layer = Layer.store(name, _nearest(difference, rank, energy, name), dtype)
        left = difference - layer.scaling * (layer.b.to(difference) @ layer.a.to(difference))
        deviations[name] = ApproximationError(layer.rank, norm, _norm(left))
        layers[name] = Layer(layer.a.cpu(), layer.b.cpu(), layer.alpha, layer.scaling)
    if not layers:
        raise ModelError(
            f"{tuned.folder} and {base.folder} have the same linear weights: there is nothing to extract. "
            "Give the fine-tuned model first and its base second"
        )
    adapter = Adapter(_config(model, layers, base_model), layers)
    used = {key for pair in keys.values() for key in pair}
    return Extraction(adapter, deviations, _not_captured(tuned, base, used))


def _keys(layer: str, model: nn.Module, tuned: ShardReader, base: ShardReader) -> tuple[str, str]:
    """Return the names of a layer's weight in both checkpoints, after checking that the weights can be compared."""
    module = model.get_submodule(layer)
    if is_conv1d(module):
        raise ModelError(
            f"{tuned.folder}: {layer} is a Conv1D layer, as in GPT-2; extract supports only models with nn.Linear"
        )
    assert isinstance(module, nn.Linear)
    shape = module.out_features, module.in_features
    names = []
    for weights in (tuned, base):
        stored = weights.layer_weight(layer)
        if stored is None:
            raise ModelError(
                f"{weights.folder}: {layer}.weight is missing, but the architecture of {tuned.folder} has this layer. "
                "Give two whole models of this architecture"
            )
        if stored.is_quantized:
            raise ModelError(
                f"{weights.folder}: {stored.name} is quantized: use checkpoints in 16 or 32 bits for both models"
            )
        if stored.shape != shape:
            raise ModelError(
                f"{weights.folder}: {stored.name} is {list(stored.shape)}, but {list(shape)} in the architecture of "
                f"{tuned.folder}. Give two models of this architecture"
            )
        names.append(stored.name)
    return names[0], names[1]


def _difference(tuned: Tensor, base: Tensor) -> Tensor:
    """Return tuned - base [out, in], in float64 for small matrices and in float32 for large ones."""
    dtype = torch.float64 if min(tuned.shape) <= SMALL else torch.float32
    return tuned.to(dtype) - base.to(dtype)


def _nearest(difference: Tensor, rank: int | None, energy: float | None, name: str) -> LowRank:
    """Return the truncated decomposition of `difference` [out, in]; the sketch grows until it holds the energy."""
    short = min(difference.shape)
    wanted = (energy or 0.0) * _norm(difference) ** 2 * (1 - ROUNDING)
    size = (rank or OVERSAMPLING) + OVERSAMPLING
    while True:
        whole = short <= SMALL or 2 * size >= short
        u, s, vh = (
            torch.linalg.svd(difference, full_matrices=False)
            if whole
            else sketch(difference, size, layer_generator(0, name))
        )
        kept = s.double().square().cumsum(0)  # energy outside the sketch counts as lost
        if whole or rank is not None or kept[-OVERSAMPLING] >= wanted:
            return LowRank.truncated(u, s, vh, rank or int((kept < wanted).sum()) + 1)
        size *= 2


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
        **target_fields(model, layers),  # only reads the layers' names
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    }


def _not_captured(tuned: ShardReader, base: ShardReader, used: set[str]) -> dict[str, float | None]:
    """Return the difference of all changed tensors that the adapter does not cover."""
    changed: dict[str, float | None] = {}
    for name in dict.fromkeys([*tuned, *base]):
        if name in used:
            continue
        if name not in tuned or name not in base or tuned.stored[name].shape != base.stored[name].shape:
            changed[name] = None
        elif norm := _distance(tuned[name], base[name]):
            changed[name] = norm
    return changed


def _distance(tuned: Tensor, base: Tensor) -> float:
    """Return the Frobenius norm of tuned - base in float64, part by part: an embedding can be the largest tensor."""
    pairs = zip(tuned.reshape(-1).split(PART), base.reshape(-1).split(PART), strict=True)
    return math.hypot(*(_norm(ours.double() - theirs.double()) for ours, theirs in pairs))
