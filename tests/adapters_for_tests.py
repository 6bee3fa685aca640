"""Writes small adapter folders in PEFT's layout without using the package, and computes their dense updates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(
    folder: Path,
    layers: Mapping[str, tuple[int, int, int]],
    *,
    seed: int = 0,
    alpha: float = 8,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a random adapter. `layers` gives (out, in, rank) of each layer; targets are the last parts of the names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into, rank) in layers.items():
        key = f"base_model.model.{name}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(rank, into, generator=generator).to(dtype)
        tensors[f"{key}B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    ranks = [rank for _, _, rank in layers.values()]
    fields = {
        "peft_type": "LORA",
        "r": ranks[0],
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "rank_pattern": {name: rank for name, (_, _, rank) in layers.items() if rank != ranks[0]},
        "base_model_name_or_path": "some/base",
    }
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(fields | config))
    save_file(tensors, folder / TENSORS)
    return folder


def updates(folder: Path) -> dict[str, Tensor]:
    """Return the dense update scaling * B A [out, in] of every layer in float64, with patterns read as PEFT does."""
    import re

    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / TENSORS)
    found = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["lora_alpha"]
        for pattern, value in config.get("alpha_pattern", {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = value
                break
        rank = a.shape[0]
        scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        found[name] = scaling * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return found
