"""Reading and writing adapter_config.json. Each field of PEFT's LoraConfig is obeyed, harmless, or refused by name.

No field is ignored in silence: the adapter would then compute something other than its config demands.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from qlora.adapter.identity import BaseIdentity
from qlora.adapter.lora_spec import MAX_ALPHA, SCALINGS, LoraSpec
from qlora.adapter.patterns import exactly, pattern_value
from qlora.adapter.peft_experts import FIELD, shortest
from qlora.adapter.peft_experts import targets_of as experts_in
from qlora.adapter.peft_parameters import is_parameter, key_of, parameter_of, taken_for_experts
from qlora.adapter.peft_tensors import CONFIG_FILE as CONFIG_FILE
from qlora.adapter.targets import is_linear, layer_names, list_layers
from qlora.adapter.trained_parts import without_parts
from qlora.errors import ModelError
from qlora.quantization.expert_stack import expert_parameters, expert_stacks

INITIAL_FILE = "adapter_initial.safetensors"
"""A and B before the first step, see initial.py"""


class LoraLayer(Protocol):
    """The numbers of an adapted layer that adapter_config.json records: rank, alpha and scaling.

    `LoRALinear` has them, and so has the `Layer` of adapter/algebra, which exists without a model.
    """

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def scaling(self) -> float: ...


class Kind(NamedTuple):
    """Types that a field can have; null is always allowed."""

    words: str
    """the types in words, for error messages"""
    types: tuple[type, ...]
    entries: type | None = None
    """type of a list's entries"""


_NAMES = Kind("a string or a list of strings", (str, list), str)
HONOURED = {
    "peft_type": Kind("a string", (str,)),
    "target_modules": _NAMES,
    "target_parameters": Kind("a list of strings", (list,), str),
    "exclude_modules": _NAMES,
    "layers_to_transform": Kind("a whole number or a list of them", (int, list), int),
    "layers_pattern": _NAMES,
    "r": Kind("a whole number", (int,)),
    "lora_alpha": Kind("a number", (int, float)),
    "rank_pattern": Kind("an object", (dict,)),
    "alpha_pattern": Kind("an object", (dict,)),
    "use_rslora": Kind("true or false", (bool,)),
    "lora_dropout": Kind("a number", (int, float)),
    "fan_in_fan_out": Kind("true or false", (bool,)),
    "base_model_name_or_path": Kind("a string", (str,)),
    "revision": Kind("a string", (str,)),
}
"""Fields that are obeyed. (fan_in_fan_out describes the weight layout of the base's layers. Like PEFT, we read the
layout from the layers themselves.)"""

INFORMATION = {
    "task_type": "purpose of the model",
    "auto_mapping": "class of the base, which is never imported from here",
    "peft_version": "version of PEFT that wrote the file",
    "inference_mode": "freezing of A and B in PEFT",
    "runtime_config": "device that PEFT computes on",
    "megatron_core": "module name that only megatron_config uses",
    "qalora_group_size": "only used with use_qalora",
    "ensure_weight_tying": "only concerns the start of a training",
    "eva_config": "initialisation of A",
}
"""Fields that do not change what a finished adapter computes, and the meaning of each."""

REFUSED = {
    "bias": "biases of the base were trained",
    "init_lora_weights": "this initialisation changes the base; save the adapter as plain LoRA with PEFT",
    "lora_bias": "B has a bias",
    "layer_replication": "layers of the base are repeated",
    "use_dora": "true only with peft_type LORA: DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "loftq_config": "LoftQ changes the base",
    "corda_config": "CorDA changes the base",
    "lora_ga_config": "LoRA-GA changes the base",
    "megatron_config": "Megatron layers",
}
"""Fields that must be empty or neutral, and the meaning of any other value."""

NOTHING: tuple[Any, ...] = (None, False, {}, [])
HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that do not change the base."""
NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": HARMLESS}


def config_of(model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
    """Return PEFT's config for these layers of `model`.

    `r` and `lora_alpha` are the commonest rank and alpha; patterns record the layers that differ.

    Raises:
        ModelError: PEFT's config cannot express the layers.
    """
    rank = commonest([layer.rank for layer in layers.values()])
    alpha = commonest([layer.alpha for layer in layers.values()])
    targets = target_fields(model, layers)
    keys = {name: exactly(key_of(name, experts_in(targets))) for name in layers}
    dropouts = {layer.dropout: name for name, layer in layers.items()}
    if len(dropouts) > 1:
        examples = ", ".join(f"{dropout} in {name}" for dropout, name in list(dropouts.items())[:3])
        raise ModelError(
            f"the layers have different dropout ({examples}), and PEFT's config holds only one. Train all layers with "
            "one adapter.dropout"
        )
    return {
        **targets,
        "alpha_pattern": {
            keys[name]: _plain(layer.alpha) for name, layer in layers.items() if layer.alpha != alpha
        },
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        # PEFT's name for a base that was changed in this way; PEFT then makes the change itself, or refuses (NF4)
        "init_lora_weights": "pissa" if base.changed else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(alpha),
        "lora_bias": False,
        "lora_dropout": 0.0 if experts_in(targets) else next(iter(dropouts)),  # PEFT has none for parameters
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {keys[name]: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "revision": base.revision,
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "use_dora": False,
        "use_rslora": is_rslora(layers),
    }


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of any method's adapter_config.json. Raises ModelError if it is missing or not a JSON object."""
    if not path.is_file():
        raise ModelError(
            f"{path.parent}: there is no adapter: {path.name} is missing. Give the folder of an adapter"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}. Restore the file") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object. Restore the file")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Read and check the fields of a LoRA config. Raises ModelError as `read_fields` and `check_config` do."""
    config = read_fields(path)
    check_config(without_parts(config, path), path)
    return config


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError if a field that LoRA's config can have is unknown, unsupported or of the wrong type."""
    for field, value in config.items():
        if field in HONOURED:
            _check_type(field, value, path)
        elif field == "init_lora_weights" and value == "pissa" and (path.parent / INITIAL_FILE).is_file():
            continue  # ours: the file tells how the base was changed
        elif field not in INFORMATION and value not in NEUTRAL.get(field, NOTHING):
            meaning = REFUSED.get(field, "a field that this version of qlora does not know")
            raise ModelError(
                f"{path}: {field} = {json.dumps(value)} is not supported ({meaning}). Use an adapter that was "
                "trained without it"
            )
    _check_expressions(config, path)
    _check_choice_of_layers(config, path)


def targets_in(
    model: nn.Module,
    config: Mapping[str, Any],
    stored: Mapping[str, Any],
    path: Path,
    can_adapt: Callable[[nn.Module], bool] = is_linear,
) -> list[str]:
    """Return the layers of `model` that `config` targets, chosen as in PEFT, in the order of the model.

    Args:
        model: the model that the adapter is for.
        config: the fields of adapter_config.json.
        stored: layers that have tensors; they are the targets if the config names none.
        path: the config's file, for error messages.
        can_adapt: function that returns True for the layers that the method adapts.

    Raises:
        ModelError: no layer matches.
    """
    known, experts = layer_names(model, can_adapt), expert_stacks(model)
    layers = [name for name in known if name not in experts]
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if targets is None:
        names = [name for name in layers if name in stored]
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        linears = [name for name in layers if is_linear(model.get_submodule(name))]
        names = [name for name in linears if head is None or model.get_submodule(name) is not head]
    else:
        names = list(filter(_matcher(targets), layers))
    is_excluded = _matcher(excluded)
    names = [name for name in names if not is_excluded(name)]
    if indices is not None and indices != []:
        chosen = {indices} if isinstance(indices, int) else set(indices)
        names = [name for name in names if _layer_index(name, patterns) in chosen]
    if parameters := experts_in(config):
        is_chosen = _matcher(parameters)
        chosen = {name for name in experts if is_chosen(name)}
        chosen |= {
            name for name in layers if is_parameter(name, parameters) and is_linear(model.get_submodule(name))
        }
        names = [name for name in known if name in chosen or name in names]
    if not names:
        raise ModelError(
            f"{path}: the adapter does not fit this model: its target_modules, {json.dumps(targets)}, match no "
            f"layer of {type(model).__name__}. {list_layers(model, layers)} "
            "Load the base that it was trained on"
        )
    return names


def spec_of_layer(config: Mapping[str, Any], name: str, path: Path) -> LoraSpec:
    """Return the settings of the layer `name`, whose tensors are loaded next; missing fields have PEFT's defaults."""
    key = key_of(name, experts_in(config))
    rank = pattern_value(config.get("rank_pattern") or {}, key, _or(config.get("r"), 8))
    alpha = pattern_value(config.get("alpha_pattern") or {}, key, _or(config.get("lora_alpha"), 8))
    if type(rank) is not int or rank < 1:
        raise ModelError(f"{path}: r of {name} must be a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise ModelError(
            f"{path}: lora_alpha of {name} must be a number above 0 and at most {MAX_ALPHA:g}, not {alpha!r}"
        )
    scaling = "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
    return LoraSpec(rank, alpha, _dropout(config, path), scaling, init="zero")


def _dropout(config: Mapping[str, Any], path: Path) -> float:
    """Return the dropout, which is the same in all layers."""
    dropout = config.get("lora_dropout") or 0
    if not 0 <= dropout < 1:
        raise ModelError(f"{path}: lora_dropout must be at least 0 and below 1, not {dropout!r}")
    return float(dropout)


def is_rslora(layers: Mapping[str, LoraLayer]) -> bool:
    """Return True if these layers are scaled by alpha/sqrt(rank). Raises ModelError if only some of them are."""
    others = []
    for use_rslora, scale in ((False, SCALINGS["alpha/rank"]), (True, SCALINGS["alpha/sqrt(rank)"])):
        differing = [
            name
            for name, layer in layers.items()
            if not math.isclose(layer.scaling, scale(layer.alpha, layer.rank))
        ]
        if not differing:
            return use_rslora
        others.append(differing[0])
    raise ModelError(
        f"{others[1]} is scaled by alpha/rank, and {others[0]} by alpha/sqrt(rank), but PEFT's config holds one "
        "scaling for all layers. Train all layers with one adapter.scaling"
    )


def target_fields(model: nn.Module, layers: Collection[str]) -> dict[str, Any]:
    """Return target_modules and, if PEFT needs it, target_parameters, which match exactly these layers in PEFT."""
    projections = _projections(model)
    experts = [name for name in projections if name in layers]
    linears = [name.removesuffix(".base") for name, module in model.named_modules() if is_linear(module)]
    weights = taken_for_experts(model, [name for name in layers if name not in experts])
    parameters = [
        *shortest(experts, projections),
        *shortest(map(parameter_of, weights), map(parameter_of, linears)),
    ]
    modules = [name for name in layers if name not in experts and name not in weights]
    fields: dict[str, Any] = {"target_modules": targets_of(model, modules) if modules else []}
    return fields | ({FIELD: parameters} if parameters else {})


def targets_of(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """Return target_modules that match exactly these layers in PEFT: last parts of names, names, or an expression."""
    experts = _projections(model)  # parameters in PEFT's model, which target_modules never match
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_modules() if not name.startswith(inside) and name not in experts]
    for entries in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        if set(filter(_matcher(list(entries)), names)) == set(layers):
            return sorted(entries)
    return "|".join(re.escape(name) for name in layers)


def _projections(model: nn.Module) -> list[str]:
    """Return the names of all projections of experts, adapted or not, ours or transformers'."""
    return [*(name.removesuffix(".base") for name in expert_stacks(model)), *dict(expert_parameters(model))]


def _matcher(entries: str | list[str]) -> Callable[[str], bool]:
    """Match names as PEFT does: a list holds names or their last parts; a string is an expression for whole names."""
    if isinstance(entries, str):
        expression = re.compile(entries)
        return lambda name: expression.fullmatch(name) is not None
    whole, endings = set(entries), tuple(f".{entry}" for entry in entries)
    return lambda name: name in whole or name.endswith(endings)


def _layer_index(name: str, patterns: str | list[str]) -> int | None:
    """Return the number after `<pattern>.` in a layer's name, or without patterns the first number after two parts."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        if match := re.match(expression, name):
            return None if match["index"] is None else int(match["index"])
    return None


def _check_type(field: str, value: Any, path: Path) -> None:
    kind, entries = HONOURED[field], value if isinstance(value, list) else []
    fits = type(value) in kind.types and all(type(entry) is kind.entries for entry in entries)
    if value is not None and not fits:
        raise ModelError(f"{path}: {field} must be {kind.words}, not {json.dumps(value)}")


def _check_choice_of_layers(config: Mapping[str, Any], path: Path) -> None:
    """Check PEFT's own rules for the fields that choose layers."""
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if isinstance(config.get("target_modules"), str) and (indices is not None or patterns):
        raise ModelError(
            f"{path}: layers_to_transform and layers_pattern need a list in target_modules; write one"
        )
    if patterns and indices is None:
        raise ModelError(
            f"{path}: layers_pattern needs layers_to_transform; add it, or remove layers_pattern"
        )


def _check_expressions(config: Mapping[str, Any], path: Path) -> None:
    entries = [
        (field, config.get(field)) for field in ("target_modules", "exclude_modules", "layers_pattern")
    ]
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        value = config.get(field) or []
        entries += [(field, entry) for entry in value if not isinstance(value, str)]
    for field, expression in entries:
        if isinstance(expression, str):
            try:
                re.compile(expression)
            except re.error as error:
                text = f'"{expression}" is not a valid regular expression ({error})'
                raise ModelError(f"{path}: {field}: {text}") from error


def commonest(values: list[Any]) -> Any:
    """Return the commonest value; patterns then name only the layers that differ."""
    return Counter(values).most_common(1)[0][0]


def _plain(alpha: float) -> float:
    """Return alpha as PEFT writes it: a whole number has no decimal point."""
    return int(alpha) if alpha == int(alpha) else alpha


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
