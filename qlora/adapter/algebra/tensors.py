"""An adapter as plain tensors, read from its folder and written to a new one: no model is needed.

The layout is that of `store`, which puts adapters into models. Reading is as strict; writing is whole or not
at all, and never over anything.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.adapter.algebra.low_rank import LowRank
from qlora.adapter.config import (
    CONFIG_FILE,
    commonest,
    is_rslora,
    read_config,
    spec_of_layer,
)
from qlora.adapter.identity import IDENTITY_FILE
from qlora.adapter.patterns import exactly
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B, TENSORS_FILE, named_tensors, read_pairs
from qlora.errors import ModelError, SaveError
from qlora.storage.draft import drafting, publish
from qlora.storage.folders import save_errors

COMPANIONS = ("recipe.yaml", IDENTITY_FILE)
"""Text files of qlora's own that travel with an adapter."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What A and B may be stored in, by name."""


@dataclass(frozen=True)
class Layer:
    """A [rank, in] and B [out, rank] of one layer as stored; the update is scaling * B A."""

    a: Tensor
    b: Tensor
    alpha: float
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def update(self) -> LowRank:
        """scaling * B A in float64."""
        return self.scaling * LowRank.of(self.b, self.a)

    @classmethod
    def store(cls, name: str, update: LowRank, dtype: torch.dtype) -> "Layer":
        """An update rounded to `dtype`, with alpha = rank, so that the scaling is 1 and rounds nothing.

        Raises ModelError if a number is too large for `dtype`.
        """
        a, b = update.a.to(dtype), update.b.to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError(f"the update of {name} is too large for {dtype_name(dtype)}")
        return cls(a, b, float(update.rank), 1.0)


@dataclass(frozen=True)
class Adapter:
    """An adapter without a model: its config, whose ranks and alphas stand in the layers, and its tensors.

    config: the fields of adapter_config.json. layers: by name, in the file's order. extra_files: text files
    that travel along, by name.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    extra_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """What the adapter says it was trained on, as `name` or `name@revision`; None if it does not."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if not isinstance(name, str) or not name:
            return None
        return name if revision in (None, "main") else f"{name}@{revision}"


def read(path: str | Path) -> Adapter:
    """The adapter in a folder (ours or PEFT's), or in the folder of a run.

    Raises ModelError if a file is missing, damaged or a pickle, the config asks for something unknown here,
    or config and tensors do not fit each other.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        folder /= "adapter"
    config = read_config(folder / CONFIG_FILE)
    pairs = read_pairs(folder)
    if not pairs:
        raise ModelError(f"{folder / TENSORS_FILE}: holds no tensors")
    _check_targets(config.get("target_modules"), pairs, folder / CONFIG_FILE)
    layers = {name: _layer(config, name, *pair, folder) for name, pair in pairs.items()}
    try:
        extra_files = {
            name: (folder / name).read_text(encoding="utf-8")
            for name in COMPANIONS
            if (folder / name).is_file()
        }
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {' and '.join(COMPANIONS)} cannot be read: {error}") from error
    return Adapter(config, layers, extra_files)


def write(adapter: Adapter, path: str | Path) -> int:
    """Write an adapter to the new folder `path`, read it back, and return the bytes of its tensors.

    Raises UsageError if `path` exists; ModelError if a number is not finite in its dtype; SaveError if the disk
    refuses. Whatever goes wrong, `path` is then not there.
    """
    folder = Path(path)
    tensors = named_tensors({name: {SUFFIX_A: x.a, SUFFIX_B: x.b} for name, x in adapter.layers.items()})
    config = json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n"
    with drafting(folder) as drafts, save_errors(folder):
        draft = drafts / "adapter"
        draft.mkdir()
        save_file(tensors, draft / TENSORS_FILE, metadata={"format": "pt"})
        for name, text in {CONFIG_FILE: config, **adapter.extra_files}.items():
            (draft / name).write_text(text, encoding="utf-8")
        back = load_file(draft / TENSORS_FILE)
        if not all(torch.equal(tensor, back[key]) for key, tensor in tensors.items()):
            raise SaveError(f"{folder}: reading back gave other numbers than were written")
        publish(draft, folder)
    return (folder / TENSORS_FILE).stat().st_size


def dtype_name(dtype: torch.dtype) -> str:
    """As `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _layer(config: Mapping[str, Any], name: str, a: Tensor, b: Tensor, folder: Path) -> Layer:
    spec = spec_of_layer(config, name, folder / CONFIG_FILE)
    for tensor, suffix, dim in ((a, SUFFIX_A, 0), (b, SUFFIX_B, 1)):
        if tensor.ndim != 2 or tensor.shape[dim] != spec.rank or not tensor.numel():
            raise ModelError(
                f"{folder / TENSORS_FILE}: {name}{suffix} is {list(tensor.shape)}, and the config's rank is {spec.rank}"
            )
    return Layer(a, b, spec.resolved_alpha, spec.factor)


def _check_targets(targets: Any, names: Iterable[str], path: Path) -> None:
    """What the config targets must be what there are tensors for, as far as that shows without a model."""
    if targets is None or targets == "all-linear":
        return
    entries = [targets] if isinstance(targets, str) else targets
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ModelError(f"{path}: target_modules must be a string or a list of strings")
    try:
        outside = [name for name in names if not any(_targets(entry, name) for entry in entries)]
    except re.error as error:
        raise ModelError(f"{path}: target_modules is no regular expression ({error})") from error
    if outside:
        raise ModelError(f"{path}: {len(outside)} layers are not targets, such as {outside[0]}")


def _targets(entry: str, name: str) -> bool:
    return name == entry or name.endswith("." + entry) or re.fullmatch(entry, name) is not None


def _config(adapter: Adapter) -> dict[str, Any]:
    """The config with the layers' ranks and alphas: the commonest, and patterns for the others."""
    layers = adapter.layers
    rank = commonest([layer.rank for layer in layers.values()])
    # of the layers of that rank: where alpha = rank, the patterns then name the same layers
    alpha = commonest([layer.alpha for layer in layers.values() if layer.rank == rank])
    return {
        **adapter.config,
        "alpha_pattern": {exactly(name): x.alpha for name, x in layers.items() if x.alpha != alpha},
        "inference_mode": True,
        "lora_alpha": alpha,
        "r": rank,
        "rank_pattern": {exactly(name): x.rank for name, x in layers.items() if x.rank != rank},
        "use_rslora": is_rslora(layers),
    }
