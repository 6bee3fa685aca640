"""Names of the experts' tensors in PEFT's file.

PEFT adapts a parameter of a module (`target_parameters`) by wrapping the module. A second parameter of the same module
wraps the wrapper, so the tensors of the first are one `base_layer` deeper:

    ...mlp.experts.base_layer.lora_A.weight     of gate_up_proj
    ...mlp.experts.lora_A.weight                of down_proj, or of the only one that is adapted

The order is that in which the model declares the parameters. Here each projection is a layer of its own name.

A [E * rank, in] holds the rows of A_e one expert after another, and B [out, rank * E] the columns of B_e side by side,
so that column r * E + e is column r of B_e.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora.quantization.expert_stack import PROJECTIONS

FIELD = "target_parameters"
"""field of PEFT's config with the adapted parameters: names, or last parts of names"""
INNER = ".base_layer"
OF_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.\w+$")
"""end of the name of a matrix of one expert, in checkpoints and in adapters for servers"""


def stems(layers: Iterable[str]) -> dict[str, str]:
    """Return the start of the tensors' names in the file for each projection of experts, by its layer's name."""
    owners: dict[str, list[str]] = {}
    for layer in layers:
        owner, _, projection = layer.rpartition(".")
        owners.setdefault(owner, []).append(projection)
    found: dict[str, str] = {}
    for owner, projections in owners.items():
        inwards = sorted(projections, key=PROJECTIONS.index, reverse=True)
        found |= {f"{owner}.{name}": owner + depth * INNER for depth, name in enumerate(inwards)}
    return found


def layer_name(stem: str, targets: Sequence[str]) -> str:
    """Return the name of the layer whose tensors' names start with `stem`; `stem` itself for any other layer.

    targets: `target_parameters` of the config.
    """
    owner = stem
    while owner.endswith(INNER):
        owner = owner.removesuffix(INNER)
    adapted = [name for name in PROJECTIONS if is_projection(f"{owner}.{name}", targets)]
    depth = stem.count(INNER) - owner.count(INNER)
    return f"{owner}.{adapted[-1 - depth]}" if depth < len(adapted) else stem


def is_projection(layer: str, targets: Iterable[str]) -> bool:
    """Return True if `layer` is a projection of experts that `targets`, the config's `target_parameters`, match."""
    known = layer.rpartition(".")[2] in PROJECTIONS
    return known and any(layer == entry or layer.endswith(f".{entry}") for entry in targets)


def split(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [E, rank, in] and B [E, out, rank] of tensors in the file's layout."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def joined(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [E, rank, in] and B [E, out, rank] in the file's layout."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def targets_of(config: Mapping[str, Any]) -> list[str]:
    """Return `target_parameters` of a config; empty if it has none, or something else than a list of names."""
    value = config.get(FIELD)
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return True if the `target_parameters` of a config name projections of experts."""
    return any(entry.rpartition(".")[2] in PROJECTIONS for entry in targets_of(config))


def targets_beside(file: Path) -> list[str]:
    """Return `target_parameters` of an adapter_config.json; empty if it cannot be read, which others report."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return targets_of(config) if isinstance(config, dict) else []


def field_with(names: Iterable[str]) -> str:
    """Return the field of the config that lacks layers of these names in the file: that of parameters for experts."""
    return FIELD if any(name.endswith((".experts", INNER)) for name in names) else "target_modules"


def has_experts_apart(layers: Iterable[str]) -> bool:
    """Return True if one of these layers is a matrix of a single expert, as in a layout for other servers."""
    return any(OF_ONE_EXPERT.search(name) for name in layers)


def shortest(layers: Iterable[str], all_layers: Iterable[str]) -> list[str]:
    """Return `target_parameters` for these of all parameters: last parts of their names, or the whole names."""
    chosen = set(layers)
    endings = {".".join(name.split(".")[-2:]) for name in chosen}
    if {name for name in all_layers if ".".join(name.split(".")[-2:]) in endings} == chosen:
        return sorted(endings)
    return sorted(chosen)
