"""Names of the experts' tensors in PEFT's file.

PEFT adapts a parameter of a module (`target_parameters`) by wrapping the module. A second parameter of the same module
wraps the wrapper, so the tensors of the first are one `base_layer` deeper:

    ...mlp.experts.base_layer.lora_A.weight     of gate_up_proj
    ...mlp.experts.lora_A.weight                of down_proj, or of the only one that is adapted

The order is that in which the model declares the parameters. Here each projection is a layer of its own name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.quantization.expert_stack import PROJECTIONS

FIELD = "target_parameters"
"""field of PEFT's config with the adapted parameters: names, or last parts of names"""
INNER = ".base_layer"


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
    adapted = [
        name
        for name in PROJECTIONS
        if any(f"{owner}.{name}" == entry or f"{owner}.{name}".endswith(f".{entry}") for entry in targets)
    ]
    depth = stem.count(INNER) - owner.count(INNER)
    return f"{owner}.{adapted[-1 - depth]}" if depth < len(adapted) else stem


def targets_of(config: Mapping[str, Any]) -> list[str]:
    """Return `target_parameters` of a config; empty if it has none, or something else than a list of names."""
    value = config.get(FIELD)
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def targets_beside(file: Path) -> list[str]:
    """Return `target_parameters` of an adapter_config.json; empty if it cannot be read, which others report."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return targets_of(config) if isinstance(config, dict) else []


def shortest(layers: Iterable[str], all_layers: Iterable[str]) -> list[str]:
    """Return `target_parameters` for these of all projections of experts: last parts of names, or whole names."""
    chosen = set(layers)
    endings = {".".join(name.split(".")[-2:]) for name in chosen}
    if {name for name in all_layers if ".".join(name.split(".")[-2:]) in endings} == chosen:
        return sorted(endings)
    return sorted(chosen)
