"""Reading and writing adapters as plain tensors, without a model.

The folder layout is the same as in `adapter/store.py`, and reading is as strict. Writing is atomic and never overwrites
anything.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora.adapter.algebra.low_rank import LowRank
from qlora.adapter.config import (
    CONFIG_FILE,
    commonest,
    is_rslora,
    read_fields,
    spec_of_layer,
)
from qlora.adapter.diffusers_file import DIFFUSERS_FILE, check_diffusers, write_diffusers
from qlora.adapter.expressions import check_expressions
from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity
from qlora.adapter.initial import InitialValues, stored_distances
from qlora.adapter.methods import AdapterMethod
from qlora.adapter.patterns import exactly
from qlora.adapter.peft_experts import field_with, has_experts_apart, is_projection, joined, split, targets_of
from qlora.adapter.peft_parameters import is_parameter, key_of
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B, TENSORS_FILE, finite, named_tensors
from qlora.adapter.store import method_for
from qlora.adapter.trained_parts import fields_of_parts, part_names, without_parts
from qlora.data.prompt_files import SYSTEM_FILE, TEMPLATE_FILE
from qlora.errors import ModelError, SaveError, listed
from qlora.storage import regular_file, tensor_file
from qlora.storage.draft import drafting, publish
from qlora.storage.folders import save_errors
from qlora.storage.manifest import check_unchanged

COMPANIONS = (
    "recipe.yaml", IDENTITY_FILE, "tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE, SYSTEM_FILE,
)  # fmt: skip
"""Text files that are copied along with an adapter."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Allowed dtypes of A and B, by name."""


@dataclass(frozen=True)
class Layer:
    """Tensors and scaling of one adapted layer; its update is scaling * B A.

    A convolution's update [out, in, *kernel] is the same product, with A as the matrix [rank, in * kernel]. An
    embedding's update is the transpose of the product, so `in` is its vocabulary and `out` its width. The layer of a
    projection of experts has a pair of each expert, all of one rank.
    """

    a: Tensor
    """[rank, in], or [experts, rank, in], in the stored dtype"""
    b: Tensor
    """[out, rank], or [experts, out, rank], in the stored dtype"""
    alpha: float
    scaling: float
    kernel: tuple[int, ...] = ()
    """sizes of a convolution's kernel"""
    suffixes: tuple[str, str] = (SUFFIX_A, SUFFIX_B)
    """endings of the names of A and B in the file"""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """A and B by suffix, in the shapes of the file; those of experts as in `peft_experts`."""
        if self.has_experts:
            return dict(zip(self.suffixes, joined(self.a, self.b), strict=True))
        a = self.a.unflatten(1, (-1, *self.kernel)) if self.kernel else self.a
        b = self.b.reshape(*self.b.shape, *(1 for _ in self.kernel))
        return dict(zip(self.suffixes, (a, b), strict=True))

    @property
    def has_experts(self) -> bool:
        """True if the layer is a projection of all experts of a mixture's layer."""
        return self.a.ndim == 3

    @property
    def rank(self) -> int:
        """Rank of the update: rows of A."""
        return self.a.shape[-2]

    @property
    def update(self) -> LowRank:
        """The update scaling * B A in float64, or the stack of those of all experts."""
        return self.scaling * LowRank.of(self.b, self.a)

    @classmethod
    def store(cls, name: str, update: LowRank, dtype: torch.dtype, like: "Layer | None" = None) -> "Layer":
        """Round an update to `dtype`, with alpha = rank, so that the scaling is 1 and causes no rounding.

        Args:
            name: name of the layer, for the error message.
            update: the update to store.
            dtype: dtype of A and B.
            like: a layer of the same kind; None means a linear layer.

        Raises:
            ModelError: a number is too large for `dtype`.
        """
        a, b = update.a.to(dtype), update.b.to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError(
                f"the update of {name} is too large for {dtype_name(dtype)}; use a wider --dtype"
            )
        stored = cls(a, b, float(update.rank), 1.0)
        return stored if like is None else replace(stored, kernel=like.kernel, suffixes=like.suffixes)


@dataclass(frozen=True)
class Adapter:
    """An adapter without a model. Ranks and alphas in the layers override those in the config."""

    config: Mapping[str, Any]
    """fields of adapter_config.json"""
    layers: Mapping[str, Layer]
    """layers by name, in the order of the file"""
    extra_files: Mapping[str, str] = field(default_factory=dict)
    """content of the text files that are copied along, by name"""
    note: str | None = None
    """remark for the user about what reading changed"""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """tensors trained beside the adapter (rows of tokens, whole modules), by their names in the file"""

    @property
    def experts(self) -> list[str]:
        """Names of the layers that are projections of experts."""
        return [name for name, layer in self.layers.items() if layer.has_experts]

    @property
    def has_experts_apart(self) -> bool:
        """True if it has A and B for each matrix of each expert, as other servers read them and qlora does not."""
        return has_experts_apart(self.layers)

    @property
    def base(self) -> str | None:
        """Base that the config names, as `name` or `name@revision`; None if it names none."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if not isinstance(name, str) or not name:
            return None
        return name if revision in (None, "main") else f"{name}@{revision}"


def read(path: str | Path) -> Adapter:
    """Read an adapter from its folder.

    An adapter whose initialisation changed the base (PiSSA) is converted to the unchanged base: A0 and B0 before the
    first step become further rows of A and columns of B, so that B A - B0 A0 is added to the base's own weights.

    Args:
        path: an adapter folder, written by qlora or PEFT, or the folder of a run.

    Raises:
        ModelError: a file is missing, damaged or a pickle, the config is not supported, or config and tensors do not
            match.
    """
    folder = adapter_folder(path)
    method = method_in(folder)
    config, pairs = method.as_lora(folder)
    config = {**config, **fields_of_parts(fields := read_fields(folder / CONFIG_FILE))}
    parts = part_names(folder, fields, [suffix for kind in method.layers for suffix in kind.SAVED])
    if not pairs:
        raise ModelError(
            f"{folder / TENSORS_FILE}: holds no tensors; restore the file, or train the adapter again"
        )
    check_expressions(config, pairs, folder / CONFIG_FILE)
    parameters = targets_of(config)
    experts = [name for name in pairs if is_projection(name, parameters)]
    others = [name for name in pairs if name not in experts and not is_parameter(name, parameters)]
    _check_targets(config.get("target_modules"), others, folder / CONFIG_FILE)
    layers = {name: _layer(config, name, pair, folder, name in experts) for name, pair in pairs.items()}
    _check_experts({name: layers[name] for name in experts}, folder)
    beside = load_file(folder / TENSORS_FILE) if parts else {}
    adapter = replace(
        without_layers(folder, config), layers=layers, parts={name: beside[name] for name in parts}
    )
    values = InitialValues.stored(folder)
    if values is None:
        return adapter
    if values.changed is None:
        return replace(adapter, note=_correction(values, folder))
    return _on_the_unchanged_base(adapter, values, folder)


def without_layers(folder: Path, config: Mapping[str, Any]) -> Adapter:
    """Return an adapter with this config and the text files of `folder`, and no layers."""
    extra_files = {name: _text(folder / name) for name in COMPANIONS if (folder / name).is_file()}
    return Adapter(config, {}, extra_files)


def adapter_folder(path: str | Path) -> Path:
    """Return the adapter folder in `path`, itself or the folder of a run.

    Raises:
        ModelError: the adapter has changed since its training.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        folder /= "adapter"
    check_unchanged(folder)
    return folder


def method_in(folder: Path) -> AdapterMethod:
    """Return the method of the adapter in `folder`. Raises ModelError if the config is missing, or not supported."""
    file = folder / CONFIG_FILE
    config = read_fields(file)
    method = method_for(config, file)
    method.check(without_parts(config, file), file)
    return method


def write(adapter: Adapter, path: str | Path, *, diffusers: str | None = None) -> int:
    """Write an adapter to a new folder, and verify the tensors by reading them back.

    Args:
        adapter: the adapter to write.
        path: the folder, which must not exist. It does not exist after an error either.
        diffusers: name of the model in a pipeline of diffusers: also write the file that diffusers reads.

    Returns:
        Size of the tensor file in bytes.

    Raises:
        UsageError: `path` exists.
        ModelError: a number is not finite, PEFT's config cannot express the adapter, or diffusers cannot read it.
        SaveError: a file cannot be written, or the tensors read back differ.
    """
    folder = Path(path)
    tensors = named_tensors({name: layer.tensors for name, layer in adapter.layers.items()}, adapter.experts)
    tensors |= finite(adapter.parts)
    fields = _config(adapter)
    config = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    if diffusers is not None:
        check_diffusers(tensors, fields)
    with drafting(folder) as drafts, save_errors(folder):
        draft = drafts / "adapter"
        draft.mkdir()
        tensor_file.write(draft / TENSORS_FILE, tensors, {"format": "pt"})
        if diffusers is not None:
            write_diffusers(draft / DIFFUSERS_FILE, tensors, fields, diffusers)
        for name, text in {CONFIG_FILE: config, **adapter.extra_files}.items():
            (draft / name).write_text(text, encoding="utf-8")
        back = load_file(draft / TENSORS_FILE)
        if not all(torch.equal(tensor, back[key]) for key, tensor in tensors.items()):
            raise SaveError(
                f"{folder}: the numbers read back differ from the numbers written; check this disk, or write to another"
            )
        publish(draft, folder)
    return (folder / TENSORS_FILE).stat().st_size


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _on_the_unchanged_base(adapter: Adapter, values: InitialValues, folder: Path) -> Adapter:
    """Return the adapter with B A - B0 A0 in place of B A (Meng et al. 2024, conversion to LoRA)."""
    if adapter.layers.keys() != values.layers.keys():
        raise ModelError(f"{folder}: adapter and initial values have different layers. Restore both files")
    layers = {}
    for name, layer in adapter.layers.items():
        initial = values.layers[name]
        a = torch.cat([layer.a, initial.a.to(layer.a)])
        b = torch.cat([layer.b, -initial.b.to(layer.b)], 1)
        layers[name] = Layer(a, b, layer.scaling * len(a), layer.scaling)
    files = dict(adapter.extra_files)
    if IDENTITY_FILE in files:
        files[IDENTITY_FILE] = replace(BaseIdentity.parse(files[IDENTITY_FILE]), changed=None).as_json()
    error = stored_distances(folder).get("converted")
    away = "" if error is None else f", {error:.2%} away from the base of the training (relative to the norm)"
    note = (
        f"the adapter of {values.spec.init} is converted to the unchanged base{away}; its rank is doubled, and holds "
        "only what was learned"
    )
    return Adapter({**adapter.config, "init_lora_weights": True}, layers, files, note, adapter.parts)


def _correction(values: InitialValues, folder: Path) -> str:
    """Return the remark that an adapter holds a correction of its base."""
    size = stored_distances(folder).get("converted")
    share = "" if size is None else f", {size:.2%} of the weights' norm"
    return (
        f"the update includes the correction of NF4 that {values.spec.init} started from{share}: it belongs to the NF4 "
        "base, and a 16-bit base would be corrected for an error that it does not have"
    )


def _text(file: Path) -> str:
    try:
        return regular_file.read_text(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}; restore the file, or leave it out") from error


def _layer(
    config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor], folder: Path, has_experts: bool
) -> Layer:
    spec = spec_of_layer(config, name, folder / CONFIG_FILE)
    (suffix_a, a), (suffix_b, b) = pair.items()
    count = max(1, len(a) // spec.rank) if has_experts else 1
    for tensor, suffix, dim in ((a, suffix_a, 0), (b, suffix_b, 1)):
        fits = tensor.ndim == 2 if has_experts else 2 <= tensor.ndim == a.ndim
        if not fits or tensor.shape[dim] != count * spec.rank or not tensor.numel():
            raise ModelError(
                f"{folder / TENSORS_FILE}: {name}{suffix} is {list(tensor.shape)}, but the rank in "
                f"{CONFIG_FILE} is {spec.rank}. Restore both files from the same adapter"
            )
    kernel = tuple(a.shape[2:])
    a, b = split(a, b, count) if has_experts else (a.flatten(1), b.flatten(1))
    return Layer(a, b, spec.resolved_alpha, spec.factor, kernel, (suffix_a, suffix_b))


def _check_experts(layers: Mapping[str, Layer], folder: Path) -> None:
    """Raise ModelError if the projections of a module have different numbers of experts, as a wrong rank gives them."""
    counts: dict[str, set[int]] = {}
    for name, layer in layers.items():
        counts.setdefault(name.rpartition(".")[0], set()).add(len(layer.a))
    if different := [owner for owner, numbers in counts.items() if len(numbers) > 1]:
        raise ModelError(
            f"{folder / TENSORS_FILE}: by their ranks in {CONFIG_FILE}, the projections of {listed(different)} have "
            "different numbers of experts. Restore both files from the same adapter; adapters of LongCat, whose "
            "projections differ in it, have no sums, spectra or exports"
        )


def _check_targets(targets: Any, names: Iterable[str], path: Path) -> None:
    """Raise ModelError if a layer with tensors is not a target. Targets without tensors are unknown without a model."""
    if targets is None or targets == "all-linear":
        return
    entries = [targets] if isinstance(targets, str) else targets
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ModelError(f"{path}: target_modules must be a string or a list of strings")
    try:
        outside = [name for name in names if not any(_targets(entry, name) for entry in entries)]
    except re.error as error:
        raise ModelError(f"{path}: target_modules is not a valid regular expression ({error})") from error
    if outside:
        raise ModelError(
            f"{path}: {(field := field_with(outside))} matches no name of {len(outside)} layers with tensors "
            f"({listed(outside)}). Add them to {field}"
        )


def _targets(entry: str, name: str) -> bool:
    return name == entry or name.endswith("." + entry) or re.fullmatch(entry, name) is not None


def _config(adapter: Adapter) -> dict[str, Any]:
    """Return the config with the commonest rank and alpha, and with patterns for the layers that differ."""
    layers, parameters = adapter.layers, targets_of(adapter.config)
    keys = {name: exactly(key_of(name, parameters)) for name in layers}
    rank = commonest([layer.rank for layer in layers.values()])
    # only layers of that rank count: if alpha = rank everywhere, both patterns then name the same layers
    alpha = commonest([layer.alpha for layer in layers.values() if layer.rank == rank])
    return {
        **adapter.config,
        "alpha_pattern": {keys[name]: x.alpha for name, x in layers.items() if x.alpha != alpha},
        "inference_mode": True,
        **({"lora_dropout": 0.0} if parameters else {}),  # PEFT has none for parameters
        "lora_alpha": alpha,
        "r": rank,
        "rank_pattern": {keys[name]: x.rank for name, x in layers.items() if x.rank != rank},
        "use_rslora": is_rslora(layers),
    }
