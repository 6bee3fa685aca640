"""adapter_config.json. Of PEFT's LoraConfig each field is obeyed, known to say nothing, or refused by name.

Nothing that is set is passed over in silence, as it would then be missing from what the adapter computes.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from qlora.adapter.identity import BaseIdentity
from qlora.adapter.lora_spec import SCALINGS, LoraSpec
from qlora.adapter.patterns import exactly, pattern_value
from qlora.adapter.targets import linear_names, offer
from qlora.errors import ModelError

CONFIG_FILE = "adapter_config.json"


class LoraLayer(Protocol):
    """What the config says of a layer: `LoRALinear` has it, and so have the layers of the algebra."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def scaling(self) -> float: ...


class Kind(NamedTuple):
    """What a field may hold besides null."""

    words: str
    types: tuple[type, ...]
    entries: type | None = None
    """type of a list's entries"""


_NAMES = Kind("a string or a list of strings", (str, list), str)
HONOURED = {
    "peft_type": Kind("a string", (str,)),
    "target_modules": _NAMES,
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
"""Fields that are obeyed. (fan_in_fan_out says how the base's layers store their weights; what they say
themselves is believed, as in PEFT.)"""

INFORMATION = {
    "task_type": "what the model is for",
    "auto_mapping": "the base's class, which is never imported from here",
    "peft_version": "who wrote the file",
    "inference_mode": "whether PEFT freezes A and B",
    "runtime_config": "where PEFT computes",
    "megatron_core": "the name of a module that only megatron_config uses",
    "qalora_group_size": "only used with use_qalora",
    "ensure_weight_tying": "only concerns embeddings and whole modules, which are refused",
    "eva_config": "how A was initialised",
}
"""Fields that say nothing about the mathematics of a finished adapter, and why."""

REFUSED = {
    "bias": "biases of the base were trained",
    "init_lora_weights": "this initialisation changes the base; let PEFT save it as plain LoRA",
    "lora_bias": "a bias beside B",
    "modules_to_save": "whole modules were trained",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "parameters outside of linear layers were adapted",
    "layer_replication": "layers of the base are repeated",
    "use_dora": "DoRA",
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
    "megatron_config": "layers of Megatron",
}
"""Fields that must hold nothing or a neutral value, and what they mean otherwise."""

NOTHING: tuple[Any, ...] = (None, False, {}, [])
HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is."""
NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": HARMLESS}


def config_of(model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
    """PEFT's config of these layers of `model`: the commonest rank and alpha, and patterns for the others.

    Raises ModelError for what the layout cannot say.
    """
    rank = commonest([layer.rank for layer in layers.values()])
    alpha = commonest([layer.alpha for layer in layers.values()])
    if len({layer.dropout for layer in layers.values()}) > 1:
        raise ModelError("layers with different dropout: PEFT cannot say that")
    return {
        "alpha_pattern": {
            exactly(name): _plain(layer.alpha) for name, layer in layers.items() if layer.alpha != alpha
        },
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(alpha),
        "lora_bias": False,
        "lora_dropout": next(iter(layers.values())).dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {exactly(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "revision": base.revision,
        "target_modules": targets_of(model, layers),
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "use_dora": False,
        "use_rslora": is_rslora(layers),
    }


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json of any method. Raises ModelError if it is missing or no JSON object."""
    if not path.is_file():
        raise ModelError(f"{path.parent}: there is no adapter: {path.name} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """The fields of LoRA's config. Raises ModelError if it is another method's, or as `check_config`."""
    config = read_fields(path)
    if (peft_type := config.get("peft_type")) != "LORA":
        raise ModelError(
            f'{path}: peft_type is {json.dumps(peft_type)}; only adapters of LoRA ("LORA"), whose updates are '
            "low-rank products, can be composed, extracted or inspected"
        )
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError if a field of LoRA's config is unknown, unsupported or of a wrong type."""
    for field, value in config.items():
        if field in HONOURED:
            _check_type(field, value, path)
        elif field not in INFORMATION and value not in NEUTRAL.get(field, NOTHING):
            meaning = REFUSED.get(field, "a field that this version of qlora does not know")
            raise ModelError(
                f"{path}: {field} = {json.dumps(value)} is not supported ({meaning}): only plain LoRA of "
                "linear layers is"
            )
    _check_expressions(config, path)
    _check_choice_of_layers(config, path)


def targets_in(
    model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], path: Path
) -> list[str]:
    """The linear layers of `model` that `config` targets, as PEFT would choose them, in the model's order.

    `found` are the layers that the tensors name: the targets where the config names none. Raises ModelError if
    no layer fits.
    """
    linears = linear_names(model)
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if targets is None:
        names = [name for name in linears if name in found]
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        names = [name for name in linears if head is None or model.get_submodule(name) is not head]
    else:
        names = list(filter(_matcher(targets), linears))
    is_excluded = _matcher(excluded)
    names = [name for name in names if not is_excluded(name)]
    if indices is not None and indices != []:
        chosen = {indices} if isinstance(indices, int) else set(indices)
        names = [name for name in names if _layer_index(name, patterns) in chosen]
    if not names:
        raise ModelError(
            f"{path}: the adapter does not fit this model: its target_modules, {json.dumps(targets)}, match no "
            f"layer of {type(model).__name__}. {offer(linears)}"
        )
    return names


def spec_of_layer(config: Mapping[str, Any], name: str, path: Path) -> LoraSpec:
    """The settings of the layer `name`, whose tensors are to be read; absent fields have PEFT's defaults."""
    rank = pattern_value(config.get("rank_pattern") or {}, name, _or(config.get("r"), 8))
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, _or(config.get("lora_alpha"), 8))
    if type(rank) is not int or rank < 1:
        raise ModelError(f"{path}: r of {name} must be a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e300:
        raise ModelError(f"{path}: lora_alpha of {name} must be a number above 0, not {alpha!r}")
    scaling = "alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"
    return LoraSpec(rank, alpha, _dropout(config, path), scaling, init="zero")


def _dropout(config: Mapping[str, Any], path: Path) -> float:
    """The dropout of all layers."""
    dropout = config.get("lora_dropout") or 0
    if not 0 <= dropout < 1:
        raise ModelError(f"{path}: lora_dropout must be at least 0 and below 1, not {dropout!r}")
    return float(dropout)


def is_rslora(layers: Mapping[str, LoraLayer]) -> bool:
    """Whether these layers are scaled by alpha/sqrt(rank). Raises ModelError where some are, and some are not."""
    for use_rslora, scale in ((False, SCALINGS["alpha/rank"]), (True, SCALINGS["alpha/sqrt(rank)"])):
        if all(math.isclose(layer.scaling, scale(layer.alpha, layer.rank)) for layer in layers.values()):
            return use_rslora
    raise ModelError(
        "layers scaled by alpha/rank beside layers scaled by alpha/sqrt(rank): PEFT cannot say that"
    )


def targets_of(model: nn.Module, layers: Mapping[str, LoraLayer]) -> list[str] | str:
    """What means exactly these layers to PEFT: the last parts of their names, the names, or a pattern."""
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    for entries in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        if set(filter(_matcher(list(entries)), names)) == layers.keys():
            return sorted(entries)
    return "|".join(re.escape(name) for name in layers)


def _matcher(entries: str | list[str]) -> Callable[[str], bool]:
    """PEFT's match: a list holds names or their last parts; a string is an expression for whole names."""
    if isinstance(entries, str):
        expression = re.compile(entries)
        return lambda name: expression.fullmatch(name) is not None
    whole, endings = set(entries), tuple(f".{entry}" for entry in entries)
    return lambda name: name in whole or name.endswith(endings)


def _layer_index(name: str, patterns: str | list[str]) -> int | None:
    """The number after `<pattern>.` in a layer's name or, without patterns, the first number but at its start."""
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
    """PEFT's own rules for the fields that choose layers."""
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if isinstance(config.get("target_modules"), str) and (indices is not None or patterns):
        raise ModelError(f"{path}: layers_to_transform and layers_pattern need a list in target_modules")
    if patterns and indices is None:
        raise ModelError(f"{path}: layers_pattern needs layers_to_transform")


def _check_expressions(config: Mapping[str, Any], path: Path) -> None:
    found = [(field, config.get(field)) for field in ("target_modules", "exclude_modules", "layers_pattern")]
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        value = config.get(field) or []
        found += [(field, entry) for entry in value if not isinstance(value, str)]
    for field, expression in found:
        if isinstance(expression, str):
            try:
                re.compile(expression)
            except re.error as error:
                text = f'"{expression}" is no regular expression ({error})'
                raise ModelError(f"{path}: {field}: {text}") from error


def commonest(values: list[Any]) -> Any:
    """Of several values the one that a pattern then need not name."""
    return Counter(values).most_common(1)[0][0]


def _plain(alpha: float) -> float:
    """A whole number as PEFT writes it, without a point."""
    return int(alpha) if alpha == int(alpha) else alpha


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
