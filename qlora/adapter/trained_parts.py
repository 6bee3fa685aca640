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
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.patterns import exactly
from qlora.adapter.peft_tensors import PREFIX, TENSORS_FILE
from qlora.adapter.targets import WORDS, select
from qlora.adapter.trained_rows import (
    TrainedRows,
    embedding_and_head,
    merge_rows,
)
from qlora.errors import ModelError, UsageError, listed
from qlora.quantization.expert_stack import ExpertStack
from qlora.quantization.nf4 import is_nf4
from qlora.storage.safetensors_files import stored_tensors

TOKENS, MODULES = "trainable_token_indices", "modules_to_save"
"""fields of adapter_config.json"""

DELTA = ".token_adapter.trainable_tokens_delta"

MARK = "trained_beside_an_adapter"
"""attribute of the modules that are trained as a whole, so that they are saved also after the model was frozen"""


def targets_beside(
    model: nn.Module,
    targets: str | Sequence[str],
    entries: Sequence[str],
    can_adapt: Callable[[nn.Module], bool] | None = None,
) -> str | Sequence[str]:
    """Return the targets of a model without those that `train_modules` will train as a whole; the model is unchanged.

    Args:
        model: a model without an adapter.
        targets: targets as in `select`. The words all-linear and attention leave out the layers of `entries` and those
            inside them, as in PEFT; a list that names one is refused.
        entries: as in `train_modules`.
        can_adapt: as in `select`.

    Raises:
        UsageError: an entry matches no module with parameters, or no target is left.
        ModelError: a module cannot be trained as a whole, or is also in a list of targets.
    """
    if not entries:
        return targets
    chosen, names = _choose(model, entries), select(model, targets, can_adapt)
    rest = [name for name in names if name not in chosen]
    if len(rest) == len(names):
        return targets
    if targets not in WORDS:
        raise _in_two_places(next(name for name in names if name in chosen))
    if not rest:
        raise UsageError(
            f"train_modules: {listed(list(entries))} takes every layer of targets={targets}, so no layer is left to "
            "adapt. Name fewer modules or other targets; adapter.method=full trains the whole model"
        )
    return [exactly(name) for name in rest]


def train_modules(model: nn.Module, entries: Sequence[str]) -> nn.Module:
    """Train whole modules of an adapted model, in place; `targets_beside` keeps the adapter off them.

    Args:
        model: a model with an adapter.
        entries: each is a module's name, the last parts of a name, or a regular expression for a whole name.

    Returns:
        The same model.

    Raises:
        UsageError: an entry matches no module with parameters.
        ModelError: a module is quantized, a target of the adapter, shares its weight with another one, or has a name
            that would also name another one in the adapter file.
    """
    for name, module in _choose(model, entries).items():
        if isinstance(module, ExpertStack):  # our pass computes no gradient of the matrices
            raise ModelError(
                f"train_modules: {name} is a part of experts of which another part has an adapter, and such a part "
                "cannot be trained as a whole. Make it a target too, or train all of the experts and adapt none"
            )
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
        _check_endings(model, whole)
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


def fields_of_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an adapter_config.json that name parts trained beside the adapter."""
    return {field: config[field] for field in (TOKENS, MODULES) if config.get(field)}


def has_parts(config: Mapping[str, Any]) -> bool:
    """Return True if the fields of an adapter_config.json name parts trained beside the adapter."""
    return bool(fields_of_parts(config))


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


def _choose(model: nn.Module, entries: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules that the entries match, which can be trained as a whole."""
    chosen: dict[str, nn.Module] = {}
    for entry in entries:
        chosen |= _match(model, entry)
    _check_tied(model, chosen)
    _check_endings(model, chosen)
    return chosen


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
            raise _in_two_places(name)
        if is_nf4(module) or not _is_dense(module):
            raise ModelError(
                f"train_modules: {name} is in NF4, and quantized weights cannot be trained. Make it a target of the "
                "adapter, or set base.quantization=none"
            )
    return chosen


def _in_two_places(name: str) -> ModelError:
    return ModelError(
        f"train_modules: {name} is a target of the adapter, or has trained tokens, too. Name it in one place"
    )


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


def _check_endings(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise ModelError if a reader of the adapter would find more modules by the names of the chosen ones."""
    for name, _ in model.named_modules():
        ending = next((other for other in chosen if name.endswith(other)), None)
        if ending is None:
            continue
        if others := [other for other in owners_in(model, name) if other not in chosen]:
            raise ModelError(
                f"train_modules: an adapter file names modules by the end of their name, with all inside them, so "
                f"{ending} would also name {others[0]}. Name both in train_modules (or unfreeze both), or neither"
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
