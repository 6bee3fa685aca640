"""Adapter folders in the PEFT layout, so that PEFT, vLLM and llama.cpp's converter read what is written here.

    adapter_config.json          settings, keys sorted
    adapter_model.safetensors    base_model.model.<path of the layer>.lora_A.weight [rank, in]
                                 base_model.model.<path of the layer>.lora_B.weight [out, rank]

Nothing is unpickled, and no field of the JSON chooses code. Reading is strict: every tensor has its place and
every place its tensor; else nothing is changed, and the error says which.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapter.lora import SCALINGS, LoRALinear, adapt, lora_layers, pattern_value
from qlora.adapter.targets import select
from qlora.errors import ModelError, SaveError

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"

# fmt: off
HONOURED = frozenset([
    "target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
])
# Fields that say nothing about the mathematics of a finished adapter
INFORMATION = frozenset([
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size",
])
# fmt: on
# Any other field must hold nothing, or one of these. PiSSA, OLoRA, CorDA and LoftQ change the base.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model: str | None = None, revision: str | None = None
) -> Path:
    """Write the LoRA layers of `model` to `folder` in the PEFT layout, and read them back.

        >>> save_adapter(model, "runs/mine/adapter", base_model="huggyllama/llama-7b")

    Each file replaces an older one in a single step, the tensors first. `base_model` and `revision` name
    the base in the config (None: what transformers loaded it from). Raises ModelError if there is nothing
    to save, a number is not finite or the layout cannot say it; SaveError if the disk refuses. Returns the
    folder.
    """
    folder = Path(folder)
    layers = lora_layers(model)
    if not layers:
        raise ModelError("the model has no LoRA layer: there is no adapter to save")
    if base_model is None:
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = json.dumps(_config(model, layers, base_model, revision), indent=2, sort_keys=True) + "\n"
    tensors = _tensors(layers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / TENSORS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        _write(folder / CONFIG_FILE, lambda path: path.write_text(config, encoding="utf-8"))
        _flush(folder)
        back = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{folder}: cannot save the adapter: {error}") from error
    if not all(key in back and torch.equal(tensors[key], back[key]) for key in tensors):
        raise SaveError(f"{folder / TENSORS_FILE}: reading back gave other numbers than were written")
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter in `folder` (ours or PEFT's) into `model`; returns the model.

        >>> model = load_adapter(load_base(recipe.base), "runs/mine/adapter")

    A model without LoRA layers is adapted as the config says, A and B in the folder's dtype. One that has
    them is switched: same layers, same ranks, and A, B, alpha, scaling and dropout become the folder's. Of a
    model on the meta device A and B alone become real, on the CPU.
    Raises ModelError, and leaves the model as it was, if a file is missing or damaged, the config asks for
    something unknown here, or tensors and model do not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    pairs = _read_pairs(folder)
    layers = lora_layers(model)
    names = list(layers) or _targets(model, config, pairs, folder / CONFIG_FILE)
    _check_names(names, pairs, folder / TENSORS_FILE)
    settings = {name: _settings(config, name, folder / CONFIG_FILE) for name in names}
    for name in names:
        _check_shapes(name, model.get_submodule(name), pairs[name], settings[name][0], folder / TENSORS_FILE)
    if not layers:
        ranks = {_exactly(name): rank for name, (rank, _, _) in settings.items()}
        adapt(model, targets=list(ranks), rank_pattern=ranks, init="zero", dtype=pairs[names[0]][0].dtype)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            if layer.lora_a.is_meta:
                layer.lora_a, layer.lora_b = (nn.Parameter(half) for half in pairs[name])
            else:
                layer.lora_a.copy_(pairs[name][0])
                layer.lora_b.copy_(pairs[name][1])
            layer.rank, layer.alpha, layer.scaling = settings[name]
            layer.dropout = float(config.get("lora_dropout") or 0.0)
    return model


def _config(
    model: nn.Module, layers: Mapping[str, LoRALinear], base_model: str | None, revision: str | None
) -> dict[str, Any]:
    """PEFT's config of these layers: the commonest rank and alpha, and patterns for the others."""
    rank = _commonest([layer.rank for layer in layers.values()])
    alpha = _commonest([layer.alpha for layer in layers.values()])
    return {
        "alpha_pattern": {_exactly(n): layer.alpha for n, layer in layers.items() if layer.alpha != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": _commonest([layer.dropout for layer in layers.values()]),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_exactly(n): layer.rank for n, layer in layers.items() if layer.rank != rank},
        "revision": revision,
        "target_modules": _targets_of(model, layers),
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "use_dora": False,
        "use_rslora": _is_rslora(layers),
    }


def _is_rslora(layers: Mapping[str, LoRALinear]) -> bool:
    for use_rslora, scale in ((False, SCALINGS["alpha/rank"]), (True, SCALINGS["alpha/sqrt(rank)"])):
        if all(math.isclose(layer.scaling, scale(layer.alpha, layer.rank)) for layer in layers.values()):
            return use_rslora
    raise ModelError(
        "layers scaled by alpha/rank beside layers scaled by alpha/sqrt(rank): PEFT cannot say that"
    )


def _targets_of(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """What means exactly these layers to PEFT: the last parts of their names, the names, or a pattern."""
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    for entries in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        endings = tuple(f".{entry}" for entry in entries)
        if {name for name in names if name in entries or name.endswith(endings)} == layers.keys():
            return sorted(entries)
    return "|".join(re.escape(name) for name in layers)


def _tensors(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        for suffix, parameter in ((SUFFIX_A, layer.lora_a), (SUFFIX_B, layer.lora_b)):
            if not parameter.isfinite().all():
                raise ModelError(f"{name}{suffix} is not finite: nothing was saved")
            tensors[PREFIX + name + suffix] = parameter.detach().cpu().contiguous()
    return tensors


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """On disk first, then in place: whoever looks sees the old file or the new one, whole."""
    draft = path.with_name(path.name + ".tmp")
    try:
        write(draft)
        _flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent}: there is no adapter: {CONFIG_FILE} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f'{path}: peft_type must be "LORA"')
    for field, value in config.items():
        if field in HONOURED or field in INFORMATION:
            continue
        if value not in NEUTRAL.get(field, (None, False, {}, [])):
            raise ModelError(f"{path}: {field} = {json.dumps(value)} is not supported: only plain LoRA is")
    return config


def _read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by layer name, on the CPU."""
    path = folder / TENSORS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(
                f"{folder}: adapter_model.bin is a pickle, which can run any code when it is read, so it is "
                "not read. If you trust it, convert it where PEFT is installed: load it with "
                "PeftModel.from_pretrained, and save_pretrained writes safetensors"
            )
        raise ModelError(f"{folder}: {TENSORS_FILE} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged, or no safetensors file: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, suffix = key[len(PREFIX) : -len(SUFFIX_A)], key[-len(SUFFIX_A) :]
        if not key.startswith(PREFIX) or suffix not in (SUFFIX_A, SUFFIX_B):
            raise ModelError(f"{path}: unexpected tensor {key}: only LoRA of linear layers is supported")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ModelError(f"{path}: {key} holds numbers that are not finite")
        halves.setdefault(name, {})[suffix] = tensor
    for name, half in halves.items():
        for suffix in (SUFFIX_A, SUFFIX_B):
            if suffix not in half:
                raise ModelError(f"{path}: {PREFIX}{name}{suffix} is missing")
    return {name: (half[SUFFIX_A], half[SUFFIX_B]) for name, half in halves.items()}


def _targets(model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> list[str]:
    """The layers that the config targets: a list of names or their last parts, or one regular expression."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        targets = targets if targets == "all-linear" else [f"(?:{targets})"]
    elif targets is None:
        targets = [_exactly(name) for name in found]
    elif not isinstance(targets, list) or not all(isinstance(entry, str) for entry in targets):
        raise ModelError(f"{path}: target_modules must be a string or a list of strings")
    try:
        return select(model, targets)
    except ModelError as error:
        raise ModelError(f"{path}: the adapter does not fit this model: {error}") from error


def _check_names(names: list[str], found: Mapping[str, Any], path: Path) -> None:
    missing = [name for name in names if name not in found]
    unexpected = sorted(found.keys() - names)
    if missing:
        raise ModelError(
            f"{path}: no tensors for {len(missing)} of the targeted layers, such as {missing[0]}"
        )
    if unexpected:
        raise ModelError(f"{path}: {len(unexpected)} layers are not targets, such as {unexpected[0]}")


def _settings(config: Mapping[str, Any], name: str, path: Path) -> tuple[int, float, float]:
    """Rank, alpha and scaling of the layer `name`; absent fields have PEFT's defaults."""
    patterns = [config.get(field) or {} for field in ("rank_pattern", "alpha_pattern")]
    dropout = config.get("lora_dropout") or 0.0
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise ModelError(f"{path}: rank_pattern and alpha_pattern must be objects")
    rank = pattern_value(patterns[0], name, config.get("r", 8))
    alpha = pattern_value(patterns[1], name, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1:
        raise ModelError(f"{path}: r of {name} must be a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ModelError(f"{path}: lora_alpha of {name} must be a number above 0, not {alpha!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ModelError(f"{path}: lora_dropout must be at least 0 and below 1, not {dropout!r}")
    scaling = SCALINGS["alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank"]
    return rank, alpha, scaling(alpha, rank)


def _check_shapes(name: str, module: nn.Module, pair: tuple[Tensor, Tensor], rank: int, path: Path) -> None:
    assert isinstance(module, nn.Linear | LoRALinear)
    if isinstance(module, LoRALinear) and module.rank != rank:
        raise ModelError(
            f"{path}: {name} has rank {rank}, and {module.rank} in the model: ranks cannot be switched"
        )
    shapes = (rank, module.in_features), (module.out_features, rank)
    for tensor, shape, suffix in zip(pair, shapes, (SUFFIX_A, SUFFIX_B), strict=True):
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{path}: {name}{suffix} is {list(tensor.shape)}, the model wants {list(shape)}")


def _exactly(name: str) -> str:
    """A regular expression that matches this layer alone, for `select` and for PEFT's patterns."""
    return "^" + re.escape(name)


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
