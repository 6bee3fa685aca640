"""Trained adapters with one damaged file, with their manifest and without it.

With the manifest each change must be refused. Without it an adapter can be loaded if its header, names, shapes and
numbers are still right: a flipped bit inside a tensor is another number, which no file tells.
"""

import random
import shutil
from pathlib import Path
from typing import Any

from benchmarks.faults import damage, ground
from benchmarks.faults.child import command
from benchmarks.faults.sweep import SECONDS, Case, Judged, Sweep, judge

COMMANDS = (
    ["generate", "{}", "--prompt", "Hi", "--max-new-tokens", "1"],
    ["merge", "{}", "--to", "{}-merged", "--tokens", "0", "--onto", "nf4"],
    ["adapter", "inspect", "{}"],
)


def open_adapters(shared: Path) -> Case:
    """Train the adapter to damage and return the case."""
    ground.import_all()
    recipe = ground.settings(ground.tiny_base(shared / "base"), shared / "run")
    ground.trained(ground.write_recipe(shared / "recipe.yaml", recipe))

    def case(rng: random.Random, folder: Path) -> Judged:
        adapter = shutil.copytree(shared / "run/adapter", folder / "adapter")
        guarded = rng.random() < 0.5
        file = adapter / rng.choice(
            ["adapter_config.json"] * 3 + ["adapter_model.safetensors"] * 3 + ["qlora.json", "recipe.yaml"]
        )
        before = file.read_bytes()
        what = f"{file.name}: {_change(file, rng)}"
        if file.is_file() and file.read_bytes() == before:
            return Judged("same", f"{what}, which it was")
        if not guarded:
            (adapter / "manifest.json").unlink()
        words = [word.format(adapter) for word in rng.choice(COMMANDS)]
        what += f"; {words[0]} {'with' if guarded else 'without'} manifest"
        judged = judge(command(words, SECONDS), [file.name, str(adapter)], what)
        read = words[0] != "adapter" or file.name.startswith("adapter_")
        if judged.kind == "works" and read and (guarded or "NaN" in what):
            return Judged("accepted", what)
        return judged

    return case


def _change(file: Path, rng: random.Random) -> str:
    if file.suffix == ".json" and rng.random() < 0.7:
        return damage.another_value(file, rng)
    if file.suffix == ".safetensors" and rng.random() < 0.7:
        return _tensors(file, rng)
    return damage.damage_bytes(file, rng)


def _tensors(file: Path, rng: random.Random) -> str:
    """Remove, add, rename, reshape, cast or poison a tensor; return what was done."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.choice(
        ["removed", "added", "renamed", "cut", "flat", "empty", "int64", "float64", "float16", "NaN", "inf"]
    )
    if kind in ("removed", "renamed"):
        del tensors[name]
    if kind in ("added", "renamed"):
        tensors[name.replace("layers", "layer")] = tensor
    elif kind == "cut":
        tensors[name] = tensor[:-1].contiguous()
    elif kind == "flat":
        tensors[name] = tensor.flatten()
    elif kind == "empty":
        tensors[name] = tensor[:0].contiguous()
    elif kind in ("NaN", "inf"):
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(kind)
        tensors[name] = tensor
    elif kind != "removed":
        tensors[name] = tensor.to(getattr(torch, kind))
    save_file(tensors, file)
    return f"{name}: {kind}"


SWEEP = Sweep("adapters", "damaged adapters", 400, open_adapters)
