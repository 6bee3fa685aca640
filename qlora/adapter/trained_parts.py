"""Parameters trained beside an adapter: whole modules, such as norms or a head, and rows of tokens (`trained_rows`).

They are stored as PEFT stores them, in the adapter's own files:

    adapter_config.json          modules_to_save, trainable_token_indices
    adapter_model.safetensors    base_model.model.<module>.<parameter or buffer>
                                 base_model.model.<embedding>.token_adapter.trainable_tokens_delta   [tokens, hidden]

A parameter that was unfrozen by hand is a trained part too: its module is saved. What cannot be saved is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.adapted_linear import replace_modules
from qlora.adapter.peft_tensors import PREFIX, TENSORS_FILE
from qlora.adapter.trained_rows import (
    TrainedRows,
    embedding_and_head,
    merge_rows,
)
from qlora.errors import ModelError, UsageError, listed
from qlora.quantization.nf4 import is_nf4
from qlora.storage.safetensors_files import stored_tensors

TOKENS, MODULES = "trainable_token_indices", "modules_to_save"
"""fields of adapter_config.json"""

DELTA = ".token_adapter.trainable_tokens_delta"

MARK = "trained_beside_an_adapter"
"""attribute of the modules that are trained as a whole, so that they are saved also after the model was frozen"""


def train_modules(model: nn.Module, entries: Sequence[str], targets: str | Sequence[str] = ()) -> nn.Module:
    """Train whole modules of an adapted model, in place.

    Args:
        model: a model with an adapter.
        entries: each is a module's name, the last parts of a name, or a regular expression for a whole name.
        targets: targets of the adapter. If they are a keyword such as all-linear, the modules leave them, as in PEFT; a
            module that a list names is refused.

    Returns:
        The same model.

    Raises:
        UsageError: an entry matches no module with parameters.
        ModelError: a module is quantized, a target of the adapter, or shares its weight with another one.
    """
    chosen: dict[str, nn.Module] = {}
    for entry in entries:
        if isinstance(targets, str):
            _release(model, entry)
        chosen |= _match(model, entry)
    _check_tied(model, chosen)
    for module in chosen.values():
        module.requires_grad_(True)
        setattr(module, MARK, True)
    return model


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are trained as a whole: those of `train_modules`, and those unfrozen by hand.

    A module is returned without its submodules, which are modules of their own.

    Raises:
        ModelError: a trained parameter cannot be saved.
    """
    adapted = AdaptedLayer.of(model)
    rows = TrainedRows.of(model)
    found = {}
    for name, module in model.named_modules():
        trained = any(p.requires_grad for p in module._parameters.values() if p is not None)
        if name in adapted or name in rows or not (trained or getattr(module, MARK, False)):
            continue
        owner = name.removesuffix(".base")
        if owner != name and owner in adapted | rows:
            raise ModelError(
                f"{name} is trained, but the adapter keeps it frozen. Freeze it, or take {owner} out of the targets "
                "and train it as a whole (train_modules)"
            )
        if any(name.startswith(f"{layer}.") for layer in adapted):
            continue
        if not name:
            raise ModelError(
                f"{type(model).__name__} has trained parameters of its own, outside any submodule, which PEFT's layout "
                "cannot name. Move them into a module, or freeze them"
            )
        found[name] = module
    return found


def trained_parts(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors trained beside the adapter by their names in the adapter file.

    Raises:
        ModelError: as `whole_modules`.
    """
    parts: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for name, module in TrainedRows.of(model).items():
        if module.values not in seen:  # a tied head follows the embedding
            parts[PREFIX + name + DELTA] = module.values
        seen.add(module.values)
    for name, whole in whole_modules(model).items():
        for key, tensor in state_of(whole).items():
            # the file has a tied weight under each of its names, and safetensors refuses shared memory
            parts[f"{PREFIX}{name}.{key}"] = tensor.detach().clone() if tensor in seen else tensor
            seen.add(tensor)
    return parts


def whole_parameters(model: nn.Module) -> int:
    """Return the number of the base's own parameters that are trained, a tied one counted once."""
    if not AdaptedLayer.of(model):  # trained in full
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    own = {
        parameter
        for module in whole_modules(model).values()
        for parameter in module.parameters(recurse=False)
    }
    return sum(parameter.numel() for parameter in own if parameter.requires_grad)


def part_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of adapter_config.json that name the trained parts; empty if there are none."""
    fields: dict[str, Any] = {}
    if whole := whole_modules(model):
        fields[MODULES] = _endings(model, whole)
    if rows := TrainedRows.of(model):
        ids = {name: list(module.ids) for name, module in rows.items()}
        embedding, _ = embedding_and_head(model)
        follow = (
            [name for name in rows if rows[name].values is rows[embedding].values]
            if embedding in rows
            else []
        )
        if follow == list(rows):  # of a tied or headless model: PEFT finds the modules itself
            fields[TOKENS] = ids[embedding]
        else:
            fields[TOKENS] = {_endings(model, [name])[0]: ids[name] for name in rows}
    return fields


def merge_parts(model: nn.Module) -> None:
    """Make the parts trained beside an adapter ordinary frozen parts of `model`, in place."""
    for module in whole_modules(model).values():
        module.requires_grad_(False)
        if hasattr(module, MARK):
            delattr(module, MARK)
    merge_rows(model)


def has_parts(config: Mapping[str, Any]) -> bool:
    """Return True if the fields of an adapter_config.json name parts trained beside the adapter."""
    return bool(config.get(TOKENS) or config.get(MODULES))


def part_names(folder: Path, config: Mapping[str, Any], suffixes: Collection[str]) -> list[str]:
    """Return the names of the tensors in an adapter folder that belong to no layer, if `config` names such parts.

    Args:
        folder: the adapter folder.
        config: fields of its adapter_config.json.
        suffixes: endings of the names of tensors of layers.
    """
    file = folder / TENSORS_FILE
    if not (has_parts(config) and file.is_file()):
        return []
    return [tensor.name for tensor in stored_tensors(file) if not tensor.name.endswith(tuple(suffixes))]


def describe_parts(config: Mapping[str, Any]) -> list[str]:
    """Return one line for each kind of part that the fields of an adapter_config.json name."""
    lines = []
    if tokens := config.get(TOKENS):
        rows = tokens if isinstance(tokens, dict) else {"the embedding": tokens}
        counts = ", ".join(
            f"{len(ids)} of {name} (ids {listed(list(map(str, ids)))})" for name, ids in rows.items()
        )
        lines.append(f"rows of tokens, trained beside the adapter: {counts}")
    if modules := config.get(MODULES):
        lines.append(f"modules trained as a whole beside the adapter: {', '.join(modules)}")
    return lines


def without_parts(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the fields of adapter_config.json that describe the adapter itself.

    Raises:
        ModelError: a field that names trained parts has a wrong type.
    """
    tokens, modules = config.get(TOKENS), config.get(MODULES)
    lists = tokens.values() if isinstance(tokens, dict) else [tokens or []]
    if not all(isinstance(ids, list) and all(type(number) is int for number in ids) for ids in lists):
        raise ModelError(
            f"{file}: {TOKENS} must be a list of token ids, or an object of such lists, not {json.dumps(tokens)}"
        )
    if modules is not None and not (
        isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    ):
        raise ModelError(f"{file}: {MODULES} must be a list of strings, not {json.dumps(modules)}")
    return {field: value for field, value in config.items() if field not in (TOKENS, MODULES)}


def _release(model: nn.Module, entry: str) -> None:
    """Take the adapter off the layers that one entry matches."""
    layers = {name: layer for name, layer in AdaptedLayer.of(model).items() if _fits(name, entry)}
    replace_modules(model, {layer: layer.base for layer in layers.values()})


def _fits(name: str, entry: str) -> bool:
    try:
        return name == entry or name.endswith("." + entry) or re.fullmatch(entry, name) is not None
    except re.error as error:
        raise UsageError(f'train_modules: "{entry}" is not a valid regular expression ({error})') from error


def _match(model: nn.Module, entry: str) -> dict[str, nn.Module]:
    """Return the modules that one entry matches, each with those inside it, all with parameters of their own."""
    matched = [name for name, _ in model.named_modules() if name and _fits(name, entry)]
    chosen = {inner: module for name in matched for inner, module in owners_in(model, name).items()}
    if not chosen:
        inside = tuple(f"{name}." for name in AdaptedLayer.of(model))
        leaves = Counter(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if name and _is_dense(module) and not f"{name}.".startswith(inside)
        )
        others = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.items())
        raise UsageError(
            f'train_modules: "{entry}" matches no module with parameters in {type(model).__name__}. Modules with '
            f"parameters: {others}"
        )
    layers: dict[str, nn.Module] = {**AdaptedLayer.of(model), **TrainedRows.of(model)}
    for name, module in chosen.items():
        if any(name == layer or name.startswith(f"{layer}.") for layer in layers):
            raise ModelError(
                f"train_modules: {name} is a target of the adapter, or has trained tokens, too. Name it in one place"
            )
        if is_nf4(module) or not _is_dense(module):
            raise ModelError(
                f"train_modules: {name} is in NF4, and quantized weights cannot be trained. Make it a target of the "
                "adapter, or set base.quantization=none"
            )
    return chosen


def _is_dense(module: nn.Module) -> bool:
    """Return True if the module has parameters of its own that are numbers, not packed codes."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return bool(own) and all(parameter.is_floating_point() for parameter in own)


def _check_tied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise ModelError if a chosen module shares a parameter with one that is not chosen."""
    owned = {p for module in chosen.values() for p in module._parameters.values() if p is not None}
    for name, module in model.named_modules():
        if name not in chosen and (
            shared := owned.intersection(p for p in module._parameters.values() if p is not None)
        ):
            other = next(n for n, m in chosen.items() if shared.intersection(m._parameters.values()))
            raise ModelError(
                f"train_modules: {other} shares its weight with {name}, so training one would change or untie the "
                f"other. Name both, or train rows of tokens (train_tokens)"
            )


def owners_in(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules with tensors of their own at and below `name`."""
    found = {}
    for inner, module in model.get_submodule(name).named_modules(prefix=name):
        if state_of(module):
            found[inner] = module
    return found


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters and saved buffers, without those of its submodules."""
    buffers = {
        key: buffer
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _endings(model: nn.Module, names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return the shortest endings that match exactly these modules in PEFT, which compares ends of whole names."""
    everything = [name for name, _ in model.named_modules()]
    endings = set()
    for name in names:
        ending = name.rpartition(".")[2]
        alone = all(other in names for other in everything if other.endswith(ending))
        endings.add(ending if alone else name)
    return sorted(endings)
