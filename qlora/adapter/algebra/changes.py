"""Change of each layer by an adapter of any method, measured against the base's weights, without a model.

An adapter whose updates are low-rank products has spectra (`spectrum`); this is for the others.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.algebra.tensors import adapter_folder, method_in
from qlora.adapter.config import CONFIG_FILE, read_fields
from qlora.adapter.peft_tensors import TENSORS_FILE, read_layers
from qlora.adapter.trained_parts import part_names
from qlora.errors import ModelError
from qlora.storage.safetensors_files import ShardReader, stored_tensors


@dataclass(frozen=True)
class Change:
    """Change of one layer."""

    norm: float
    """Frobenius norm of the change of the weight, or the norm of the change of the bias"""
    base_norm: float | None
    """Frobenius norm of the base's weight; None if the weight does not change"""
    numbers: Mapping[str, float]
    """numbers of the method, such as the rank, by their headings"""

    @property
    def relative_norm(self) -> float | None:
        """`norm` divided by `base_norm`; None if the weight does not change."""
        return self.norm / self.base_norm if self.base_norm else None

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        return {**asdict(self), "relative_norm": self.relative_norm}


def part_shapes(path: str | Path) -> dict[str, list[int]]:
    """Return the shape of each tensor that was trained beside the adapter in `path`, by its name in the file."""
    folder = adapter_folder(path)
    config, method = read_fields(folder / CONFIG_FILE), method_in(folder)
    suffixes = [suffix for kind in method.layers for suffix in kind.SAVED]
    names = {*part_names(folder, config, suffixes)} - {*method.stored_shared(config)}
    return {x.name: list(x.shape) for x in stored_tensors(folder / TENSORS_FILE) if x.name in names}


def changes(path: str | Path, base: ShardReader) -> dict[str, Change]:
    """Return the change of every layer by the adapter in `path`, the folder of an adapter or of a run.

    Args:
        path: an adapter folder, or the folder of a run.
        base: the weights of the base.

    Raises:
        ModelError: a file is missing or damaged, or the base lacks a layer in 16 or 32 bits.
    """
    folder = adapter_folder(path)
    file, method = folder / CONFIG_FILE, method_in(folder)
    config, shared = read_fields(file), method.stored_shared(read_fields(file))
    kinds = [list(kind.SAVED) for kind in method.layers]
    parts = part_names(folder, config, [suffix for kind in kinds for suffix in kind])
    stored, others = read_layers(folder, kinds, [*shared, *parts])
    weights = {
        name: _weight(base, name, folder, transposed=bool(config.get("fan_in_fan_out"))) for name in stored
    }
    linears = {name: _linear(weight) for name, weight in weights.items()}
    layers = {name: method.layer_for(x)(x, method.spec(config, name, file)) for name, x in linears.items()}
    for name, layer in layers.items():
        shapes = layer.shapes(linears[name], layer.spec)
        for suffix, attribute in layer.SAVED.items():
            tensor = stored[name][suffix]
            if tuple(tensor.shape) != shapes[suffix]:
                raise ModelError(
                    f"{folder}: {name}{suffix} is {list(tensor.shape)}, and the base needs {list(shapes[suffix])}. "
                    "Give the base that the adapter was trained on, with --base"
                )
            setattr(layer, attribute, nn.Parameter(tensor))
    common = {name: others[name] for name in shared}
    method.check_shared(list(linears.values()), [layer.spec for layer in layers.values()], common, folder)
    method.load_shared(nn.ModuleList(layers.values()), common, folder)
    return {name: _change(layer, weights[name]) for name, layer in layers.items()}


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear for a weight [out, in], without numbers."""
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")


def _weight(base: ShardReader, name: str, folder: Path, *, transposed: bool) -> Tensor:
    stored = base.layer_weight(name)
    if stored is None or stored.is_quantized:
        raise ModelError(
            f"{folder}: the base has no weight of {name} in 16 or 32 bits to measure the change against. Give the base "
            "that was quantized, with --base"
        )
    weight = stored.read().float()
    return weight.T if transposed else weight


def _change(layer: AdaptedLayer, weight: Tensor) -> Change:
    numbers = layer.numbers(weight)
    if not layer.changes_weight:
        return Change(_norm(layer.merged_bias()), None, numbers)
    return Change(_norm(layer.merged_weight(weight) - weight), _norm(weight), numbers)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
