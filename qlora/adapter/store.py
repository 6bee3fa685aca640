"""Adapter folders in the PEFT layout, so that PEFT, vLLM and llama.cpp's converter read what is written here.

    adapter_config.json          settings, keys sorted; LoRA's as in config.py
    adapter_model.safetensors    base_model.model.<path of the layer>.lora_A.weight [rank, in]
                                 base_model.model.<path of the layer>.lora_B.weight [out, rank]
                                 (of another method: what its layer's SAVED names)
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

from qlora.adapter.adapted_linear import AdaptedLinear, wrap
from qlora.adapter.config import CONFIG_FILE, read_fields
from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity, require_same_base
from qlora.adapter.methods import ADAPTERS, AdapterMethod
from qlora.adapter.peft_tensors import TENSORS_FILE, named_tensors, read_layers
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
    """Write the adapter in `model` to `folder` in the PEFT layout, and read it back.

        >>> save_adapter(model, "runs/mine/adapter", base_model="huggyllama/llama-7b")

    Each file replaces an older one in a single step, the tensors first. `base` is what the adapter was trained
    on (None: what `model` tells of itself); `base_model` and `revision` give it other names. Raises ModelError
    if there is nothing to save, a number is not finite or the layout cannot say it; SaveError if the disk
    refuses. Returns the folder.
    """
    folder = Path(folder)
    layers = AdaptedLinear.of(model)
    base = base or BaseIdentity.of(model)
    base = replace(base, name=base_model or base.name, revision=revision or base.revision)
    fields = method_of(layers).config(model, layers, base)
    config = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    tensors = named_tensors({name: layer.saved() for name, layer in layers.items()})
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

    A model without an adapter is adapted as the config says, with tensors in the folder's dtype. One that has
    an adapter is switched: same method, same layers, same shapes, and the tensors and settings become the folder's.
    Of a model on the meta device the adapter's tensors alone become real, on the CPU.

    An adapter that was trained on another base than `base` (None: what `model` tells of itself) is refused,
    unless `any_base` says that another will do. One without a record, as of PEFT, is known by names only.

    Raises ModelError, and leaves the model as it was, if it is another base, a file is missing or damaged, the
    config asks for something unknown here, or tensors and model do not fit.
    """
    folder = Path(folder)
    file, tensors_file = folder / CONFIG_FILE, folder / TENSORS_FILE
    config = read_fields(file)
    method = ADAPTERS.get(str(config.get("peft_type")))
    if method is None:
        known = " or ".join(f'"{name}"' for name in ADAPTERS)
        raise ModelError(f"{file}: peft_type must be {known}")
    method.check(config, file)
    if not any_base:
        recorded = BaseIdentity.read(folder) or BaseIdentity(config.get("base_model_name_or_path"))
        require_same_base(recorded, base or BaseIdentity.of(model), folder)
    found = read_layers(folder, method.layer.SAVED)
    layers = AdaptedLinear.of(model)
    if layers and method_of(layers) is not method:
        raise ModelError(f"{file}: the model has an adapter of another method than {method.name}")
    names = list(layers) or method.targets(model, config, found, file)
    _check_names(names, found, tensors_file)
    specs = {name: method.spec(config, name, file) for name in names}
    for name, spec in specs.items():
        _check_shapes(name, model.get_submodule(name), found[name], method, spec, tensors_file)
    if not layers:
        protect(model.requires_grad_(False))
        dtype = next(iter(found[names[0]].values())).dtype
        specs = {name: replace(spec, dtype=dtype) for name, spec in specs.items()}
        wrap(model, {n: method.layer(model.get_submodule(n), spec) for n, spec in specs.items()})
    with torch.no_grad():
        for name, layer in AdaptedLinear.of(model).items():
            layer.spec = specs[name]
            for suffix, parameter in layer.saved().items():
                if parameter.is_meta:
                    setattr(layer, layer.SAVED[suffix], nn.Parameter(found[name][suffix]))
                else:
                    parameter.copy_(found[name][suffix])
    return model


def method_of(layers: Mapping[str, AdaptedLinear]) -> AdapterMethod:
    """The method that these layers of a model are of. Raises ModelError if there are none."""
    if not layers:
        raise ModelError("the model has no adapter: there is nothing to save")
    kind = type(next(iter(layers.values())))
    return next(method for method in ADAPTERS.values() if method.layer is kind)


def _check_names(names: list[str], found: Mapping[str, Any], path: Path) -> None:
    missing = [name for name in names if name not in found]
    unexpected = sorted(found.keys() - names)
    if missing:
        raise ModelError(
            f"{path}: no tensors for {len(missing)} of the targeted layers, such as {missing[0]}"
        )
    if unexpected:
        raise ModelError(f"{path}: {len(unexpected)} layers are not targets, such as {unexpected[0]}")


def _check_shapes(
    name: str, module: nn.Module, found: Mapping[str, Tensor], method: AdapterMethod, spec: Any, path: Path
) -> None:
    if isinstance(module, AdaptedLinear) and (reason := module.misfit(spec)) is not None:
        raise ModelError(f"{path}: {name} {reason}")
    for suffix, shape in method.layer.shapes(module, spec).items():
        if tuple(found[suffix].shape) != shape:
            raise ModelError(
                f"{path}: {name}{suffix} is {list(found[suffix].shape)}, the model wants {list(shape)}"
            )
