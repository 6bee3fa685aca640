"""Saving and loading adapter folders in PEFT's layout, which PEFT, vLLM and llama.cpp's converter can read.

    adapter_config.json          settings, with sorted keys; LoRA's are described in config.py
    adapter_model.safetensors    base_model.model.<path of the layer>.lora_A.weight [rank, in]
                                 base_model.model.<path of the layer>.lora_B.weight [out, rank]
                                 (other methods: the suffixes in their layer's SAVED)
    adapter_initial.safetensors  A and B before the first step, if they came from the base's weights; see initial.py
    qlora.json                   fingerprint of the base model, which PEFT does not have; see identity.py
    pytorch_lora_weights.safetensors     only on request, for diffusers; see diffusers_file.py

Nothing is unpickled, and no field of the JSON selects code to run. Reading is strict: each target layer needs its
tensors, and each tensor needs its target layer. Otherwise the model stays unchanged, and the error names the mismatch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.base_digest import changed
from qlora.adapter.config import CONFIG_FILE, read_fields
from qlora.adapter.diffusers_file import DIFFUSERS_FILE, check_diffusers, write_diffusers
from qlora.adapter.experts import use_expert_stacks
from qlora.adapter.expressions import check_expressions
from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity, require_same_base
from qlora.adapter.initial import (
    InitialValues,
    prepare_base,
    prepared_base,
    require_16_bit,
    require_own_base,
    write_initial,
)
from qlora.adapter.lora_experts import LoRAExperts
from qlora.adapter.methods import ADAPTERS, AdapterMethod
from qlora.adapter.peft_experts import OF_ONE_EXPERT, field_with, has_experts, targets_of
from qlora.adapter.peft_tensors import TENSORS_FILE, finite, named_tensors, read_layers
from qlora.adapter.stored_parts import StoredParts
from qlora.adapter.trained_parts import part_fields, trained_parts, without_parts
from qlora.adapter.wrap import wrap
from qlora.errors import ModelError, SaveError, listed
from qlora.quantization.nf4 import use_nf4_linears
from qlora.storage import atomic, tensor_file
from qlora.storage.manifest import MANIFEST, check_unchanged


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    base: BaseIdentity | None = None,
    diffusers: str | None = None,
) -> Path:
    """Save the adapter of `model` in PEFT's layout, and verify the tensors by reading them back.

    Each file is replaced atomically, the tensors first.

    Args:
        model: a model with an adapter.
        folder: adapter folder; it is created if needed.
        base_model: name of the base to record, instead of the name in `base`.
        revision: revision of the base to record, instead of the revision in `base`.
        base: fingerprint of the base that the adapter was trained on; None reads it from `model`.
        diffusers: name of the model in a pipeline of diffusers, such as "unet" or "transformer": also write the file
            that diffusers' `load_lora_weights` and `load_lora_adapter` read.

    Returns:
        The folder.

    Raises:
        ModelError: the model has no adapter, a number is not finite, or PEFT's config cannot express the adapter; or,
            without `base`, training changed tensors that are no part of the adapter, such as running statistics.
        SaveError: a file cannot be written, or the tensors read back differ.

    Examples:
        >>> save_adapter(model, "runs/mine/adapter", base_model="huggyllama/llama-7b")
    """
    folder, layers = Path(folder), AdaptedLayer.of(model)
    method, parts = method_of(layers), trained_parts(model)
    if base is None:
        _refuse_lost(model, parts.values())
        base = BaseIdentity.of(model)
    require_own_base(model, base)
    base = replace(base, name=base_model or base.name, revision=revision or base.revision)
    fields = {**method.config(model, layers, base), **part_fields(model)}
    tensors = {
        **named_tensors({name: layer.saved() for name, layer in layers.items()}, LoRAExperts.of(model)),
        **finite({**method.shared(model), **parts}),
    }
    if diffusers is not None:
        check_diffusers(tensors, fields, base.changed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # it describes what is now replaced
        _write_tensors(folder / TENSORS_FILE, tensors)
        if diffusers is not None:
            with atomic.replacing(folder / DIFFUSERS_FILE) as file:
                write_diffusers(file, tensors, fields, diffusers)
        write_initial(model, folder)
        atomic.write(folder / IDENTITY_FILE, base.as_json().encode())
        atomic.write(folder / CONFIG_FILE, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{folder}: cannot save the adapter: {error}") from error
    return folder


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors and read them back. Raises SaveError if they differ."""
    with atomic.replacing(path) as file:
        tensor_file.write(file, tensors, {"format": "pt"})
    back = load_file(path)
    if not all(key in back and torch.equal(tensors[key], back[key]) for key in tensors):
        raise SaveError(
            f"{path}: the numbers read back differ from the numbers written; check this disk, or write to another"
        )


def load_adapter(
    model: nn.Module, folder: str | Path, *, base: BaseIdentity | None = None, any_base: bool = False
) -> nn.Module:
    """Load the adapter in `folder` into `model`, in place.

    A model without an adapter is frozen and adapted as the config describes, with the dtype of the stored tensors.
    A model with an adapter keeps its layers and takes the stored tensors and settings; method, layers and shapes must
    be the same. It keeps its dropout if the config names parameters, for which PEFT has none. If the model is on
    the meta device, only the adapter's tensors become real, on the CPU.

    Args:
        model: a base, or a model with an adapter of the same method.
        folder: an adapter folder, written by qlora or PEFT.
        base: fingerprint of the model; None reads it from `model`. It must match the fingerprint in the folder. An
            adapter of PEFT has no fingerprint, so only the names of the bases are compared.
        any_base: load the adapter even if it was trained on another base.

    Returns:
        The same model.

    Raises:
        ModelError: the adapter was trained on another base, a file is missing or damaged, the config is not
            supported, or the tensors do not fit the model. The model is unchanged.

    Examples:
        >>> model = load_adapter(load_base(recipe.base), "runs/mine/adapter")
    """
    folder = Path(folder)
    file, tensors_file, values = folder / CONFIG_FILE, folder / TENSORS_FILE, InitialValues.stored(folder)
    config, method = config_and_method(folder, model)
    require_16_bit(model, values, folder)
    if not any_base:
        recorded = BaseIdentity.read(folder) or BaseIdentity(config.get("base_model_name_or_path"))
        require_same_base(recorded, prepared_base(base or BaseIdentity.of(model), values), folder)
    shared, parts = method.stored_shared(config), StoredParts.find(model, config, file)
    kinds = [list(kind.SAVED) for kind in method.layers]
    stored, others = read_layers(folder, kinds, [*shared, *parts.shapes])
    parts.check(model, others, tensors_file)
    layers = AdaptedLayer.of(model)
    if layers and method_of(layers) is not method:
        raise ModelError(
            f"{file}: the model has an adapter of another method than {method.name}; load it into a base"
        )
    names = list(layers) or parts.without(method.targets(model, config, stored, file))
    _check_names(names, stored, tensors_file)
    specs = {name: method.spec(config, name, file) for name in names}
    for name, spec in specs.items():
        check_shapes(name, model.get_submodule(name), stored[name], method, spec, tensors_file)
    common = {name: others[name] for name in shared}
    method.check_shared(
        [model.get_submodule(name) for name in names], list(specs.values()), common, tensors_file
    )
    prepare_base(model, values)
    if not layers:
        dtype = _dtype(model, method, stored, common)
        specs = {name: replace(spec, dtype=dtype) for name, spec in specs.items()}
        add_layers(model, method, specs)
    _load_layers(model, specs, stored, own_dropout=bool(layers and targets_of(config)))
    method.load_shared(model, common, tensors_file)
    parts.load(model, others, in_place=bool(layers))
    return model


def config_and_method(folder: Path, model: nn.Module) -> tuple[dict[str, Any], AdapterMethod]:
    """Return the checked config of an adapter for `model` and its method. Raises ModelError as `load_adapter` does.

    The experts of `model` become modules of ours if the adapter has some for them.
    """
    check_unchanged(folder)
    file = folder / CONFIG_FILE
    config = read_fields(file)
    check_expressions(config, (name for name, _ in model.named_modules()), file)
    method = method_for(config, file)
    method.check(without_parts(config, file), file)
    if has_experts(config):
        use_expert_stacks(model)
    return config, method


def _dtype(
    model: nn.Module,
    method: AdapterMethod,
    stored: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
) -> torch.dtype:
    """Return the dtype of the stored matrices: those that all layers share, or the first of a layer."""
    name, tensors = next(iter(stored.items()))
    first = next(iter(method.layer_for(model.get_submodule(name)).SAVED))  # a method's vectors can be wider
    return next(iter(shared.values()), tensors[first]).dtype


def add_layers(model: nn.Module, method: AdapterMethod, specs: Mapping[str, Any]) -> None:
    """Freeze a model without an adapter and wrap these layers of it, by name, with their settings."""
    use_nf4_linears(model.requires_grad_(False))
    modules = {name: model.get_submodule(name) for name in specs}
    wrap(model, {name: method.layer_for(modules[name])(modules[name], specs[name]) for name in specs})


def _refuse_lost(model: nn.Module, parts: Iterable[Tensor]) -> None:
    """Raise ModelError if training changes tensors of `model` that neither the adapter nor its parts hold."""
    held = {
        id(parameter) for layer in AdaptedLayer.of(model).values() for parameter in layer.saved().values()
    }
    held |= {id(tensor) for tensor in parts}
    lost = [name for name, parameter in trainable_parameters(model).items() if id(parameter) not in held]
    if lost:
        raise ModelError(
            f"{listed(lost)} would be lost: trained (requires_grad), but no part of the adapter. Name the modules in "
            "train_modules, freeze them with requires_grad_(False), or save the whole model"
        )
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    held_names = {name for name, tensor in own if id(tensor) in held}
    lost = [name for name in changed(model) if name not in held_names]
    if lost:
        raise ModelError(
            f"{listed(lost)} would be lost: changed since the adapter was added, but no part of it. Keep such "
            "layers in eval mode in training (module.eval()), or save the whole model with torch.save"
        )


def method_for(config: Mapping[str, Any], file: Path) -> AdapterMethod:
    """Return the method whose adapter `config`, read from `file`, describes. Raises ModelError if there is none."""
    method = next((method for method in ADAPTERS if method.claims(config)), None)
    if method is None:
        known = " or ".join(f'"{name}"' for name in dict.fromkeys(method.peft_type for method in ADAPTERS))
        raise ModelError(f"{file}: peft_type must be {known}, not {json.dumps(config.get('peft_type'))}")
    return method


def method_of(layers: Mapping[str, AdaptedLayer]) -> AdapterMethod:
    """Return the adapter method of these layers of a model. Raises ModelError if there are no layers."""
    if not layers:
        raise ModelError("the model has no adapter: there is nothing to save. Add one with adapt")
    kind = type(next(iter(layers.values())))
    return next(method for method in ADAPTERS if kind in method.layers)


def _load_layers(
    model: nn.Module,
    specs: Mapping[str, Any],
    stored: Mapping[str, Mapping[str, Tensor]],
    *,
    own_dropout: bool,
) -> None:
    """Give each adapted layer its settings and its tensors by suffix; a parameter on the meta device becomes real."""
    with torch.no_grad():
        for name, layer in AdaptedLayer.of(model).items():
            dropout = layer.spec.dropout if own_dropout else None
            layer.spec = specs[name] if dropout is None else replace(specs[name], dropout=dropout)
            for suffix, parameter in layer.saved().items():
                if parameter.is_meta:
                    setattr(layer, layer.SAVED[suffix], nn.Parameter(stored[name][suffix]))
                else:
                    parameter.copy_(stored[name][suffix])


def _check_names(names: list[str], stored: Mapping[str, Any], path: Path) -> None:
    missing = [name for name in names if name not in stored]
    unexpected = sorted(stored.keys() - names)
    if missing:
        raise ModelError(
            f"{path}: no tensors for {len(missing)} of the targeted layers ({listed(missing)}). Restore the file, or "
            "load the adapter into a model without one"
        )
    if any(OF_ONE_EXPERT.search(name) for name in unexpected):
        raise ModelError(
            f"{path}: the adapter has A and B for each matrix of each expert ({listed(unexpected)}), as `qlora adapter "
            "export` and PEFT with transformers 4 write them. Load the adapter from which it was exported, or save "
            "this one again with PEFT and transformers 5"
        )
    if unexpected:
        raise ModelError(
            f"{path}: no target for {len(unexpected)} of the layers with tensors ({listed(unexpected)}). Add them to "
            f"{field_with(unexpected)} in {CONFIG_FILE}, or load the adapter into a model without one"
        )


def check_shapes(
    name: str, module: nn.Module, stored: Mapping[str, Any], method: AdapterMethod, spec: Any, path: Path
) -> None:
    """Raise ModelError if the stored tensors of a layer, by suffix, have not the shapes that `module` needs."""
    kind = method.layer_for(module)
    if isinstance(module, AdaptedLayer):
        if (reason := module.why_incompatible(spec)) is not None:
            raise ModelError(f"{path}: {name} {reason}")
    elif (reason := kind.why_unsuitable(module)) is not None:
        raise ModelError(f"{path}: {method.name} is not defined on {name}: {reason}")
    for suffix, shape in kind.shapes(module, spec).items():
        if suffix not in stored:
            raise ModelError(
                f"{path}: {name}{suffix} is missing. Load the base that the adapter was trained on"
            )
        if tuple(stored[suffix].shape) != shape:
            raise ModelError(
                f"{path}: {name}{suffix} is {list(stored[suffix].shape)}, the model needs {list(shape)}. "
                "Load the base that the adapter was trained on"
            )
