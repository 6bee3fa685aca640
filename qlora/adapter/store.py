"""Adapter folders in the PEFT layout, so that PEFT, vLLM and llama.cpp's converter read what is written here.

    adapter_config.json          settings, keys sorted; see config.py
    adapter_model.safetensors    base_model.model.<path of the layer>.lora_A.weight [rank, in]
                                 base_model.model.<path of the layer>.lora_B.weight [out, rank]
    qlora.json                   ours: the base that it was trained on; see identity.py

Nothing is unpickled, and no field of the JSON chooses code. Reading is strict: every tensor has its place and
every place its tensor; else nothing is changed, and the error says which.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapter.config import CONFIG_FILE, config_of, dropout_in, layer_settings, read_config, targets_in
from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity, require_same_base
from qlora.adapter.methods.lora import LoRALinear, lora_layers, wrap
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B, TENSORS_FILE, named_tensors, read_pairs
from qlora.adapter.targets import features
from qlora.errors import ModelError, SaveError
from qlora.quantization.nf4 import protect
from qlora.storage import atomic


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    base: BaseIdentity | None = None,
) -> Path:
    """Write the LoRA layers of `model` to `folder` in the PEFT layout, and read them back.

        >>> save_adapter(model, "runs/mine/adapter", base_model="huggyllama/llama-7b")

    Each file replaces an older one in a single step, the tensors first. `base` is what the adapter was trained
    on (None: what `model` tells of itself); `base_model` and `revision` give it other names. Raises ModelError
    if there is nothing to save, a number is not finite or the layout cannot say it; SaveError if the disk
    refuses. Returns the folder.
    """
    folder = Path(folder)
    layers = lora_layers(model)
    if not layers:
        raise ModelError("the model has no LoRA layer: there is no adapter to save")
    base = base or BaseIdentity.of(model)
    base = replace(base, name=base_model or base.name, revision=revision or base.revision)
    config = json.dumps(config_of(model, layers, base), indent=2, sort_keys=True) + "\n"
    tensors = named_tensors({name: (layer.lora_a, layer.lora_b) for name, layer in layers.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(folder / TENSORS_FILE) as file:
            save_file(tensors, file, metadata={"format": "pt"})
        atomic.write(folder / IDENTITY_FILE, base.as_json().encode())
        atomic.write(folder / CONFIG_FILE, config.encode())
        back = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{folder}: cannot save the adapter: {error}") from error
    if not all(key in back and torch.equal(tensors[key], back[key]) for key in tensors):
        raise SaveError(f"{folder / TENSORS_FILE}: reading back gave other numbers than were written")
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, *, base: BaseIdentity | None = None, any_base: bool = False
) -> nn.Module:
    """Put the adapter in `folder` (ours or PEFT's) into `model`; returns the model.

        >>> model = load_adapter(load_base(recipe.base), "runs/mine/adapter")

    A model without LoRA layers is adapted as the config says, A and B in the folder's dtype. One that has
    them is switched: same layers, same ranks, and A, B, alpha, scaling and dropout become the folder's. Of a
    model on the meta device A and B alone become real, on the CPU.

    An adapter that was trained on another base than `base` (None: what `model` tells of itself) is refused,
    unless `any_base` says that another will do. One without a record, as of PEFT, is known by names only.

    Raises ModelError, and leaves the model as it was, if it is another base, a file is missing or damaged, the
    config asks for something unknown here, or tensors and model do not fit.
    """
    folder = Path(folder)
    file, config = folder / CONFIG_FILE, read_config(folder / CONFIG_FILE)
    if not any_base:
        recorded = BaseIdentity.read(folder) or BaseIdentity(config.get("base_model_name_or_path"))
        require_same_base(recorded, base or BaseIdentity.of(model), folder)
    pairs = read_pairs(folder)
    layers = lora_layers(model)
    names = list(layers) or targets_in(model, config, pairs, file)
    _check_names(names, pairs, folder / TENSORS_FILE)
    settings, dropout = {name: layer_settings(config, name, file) for name in names}, dropout_in(config, file)
    for name in names:
        _check_shapes(name, model.get_submodule(name), pairs[name], settings[name][0], folder / TENSORS_FILE)
    if not layers:
        protect(model.requires_grad_(False))
        dtype = pairs[names[0]][0].dtype
        linears = [(name, model.get_submodule(name), settings[name][0]) for name in names]
        wrap(model, {n: LoRALinear(linear, rank, init="zero", dtype=dtype) for n, linear, rank in linears})
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            if layer.lora_a.is_meta:
                layer.lora_a, layer.lora_b = (nn.Parameter(half) for half in pairs[name])
            else:
                layer.lora_a.copy_(pairs[name][0])
                layer.lora_b.copy_(pairs[name][1])
            layer.rank, layer.alpha, layer.scaling = settings[name]
            layer.dropout = dropout
    return model


def _check_names(names: list[str], found: Mapping[str, Any], path: Path) -> None:
    missing = [name for name in names if name not in found]
    unexpected = sorted(found.keys() - names)
    if missing:
        raise ModelError(
            f"{path}: no tensors for {len(missing)} of the targeted layers, such as {missing[0]}"
        )
    if unexpected:
        raise ModelError(f"{path}: {len(unexpected)} layers are not targets, such as {unexpected[0]}")


def _check_shapes(name: str, module: nn.Module, pair: tuple[Tensor, Tensor], rank: int, path: Path) -> None:
    if isinstance(module, LoRALinear) and module.rank != rank:
        raise ModelError(
            f"{path}: {name} has rank {rank}, and {module.rank} in the model: ranks cannot be switched"
        )
    in_features, out_features = features(module)
    shapes = (rank, in_features), (out_features, rank)
    for tensor, shape, suffix in zip(pair, shapes, (SUFFIX_A, SUFFIX_B), strict=True):
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{path}: {name}{suffix} is {list(tensor.shape)}, the model wants {list(shape)}")
