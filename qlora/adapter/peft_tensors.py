"""Adapter tensors under PEFT's names, in PEFT's file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora.adapter.peft_experts import layer_name, stems, targets_beside
from qlora.errors import ModelError

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CONVERSION = (
    'python -c "import torch, safetensors.torch as s; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.contiguous().clone() for k, v in t.items()}, 'adapter_model.safetensors')\""
)
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
PAIRS = [(SUFFIX_A, SUFFIX_B), (EMBEDDING_A, EMBEDDING_B)]
"""names of A and B in linear layers and convolutions, and in embeddings"""


def named_tensors(
    layers: Mapping[str, Mapping[str, Tensor]], experts: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of all layers by their names in the file, on the CPU.

    Args:
        layers: for each layer name, its tensors by suffix, such as ".lora_A.weight".
        experts: names of the layers that are projections of experts.

    Raises:
        ModelError: a number is not finite.
    """
    places = stems(experts)
    return finite(
        {
            PREFIX + places.get(name, name) + suffix: tensor
            for name, parts in layers.items()
            for suffix, tensor in parts.items()
        }
    )


def finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return named tensors on the CPU. Raises ModelError if a number is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name.removeprefix(PREFIX)} is not finite: nothing was saved. Train again with a lower optimizer.lr"
            )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_pairs(folder: Path, others: Collection[str] = ()) -> dict[str, dict[str, Tensor]]:
    """Read A and B of each layer by suffix, A first, on the CPU. Raises ModelError as `read_layers` does."""
    layers, _ = read_layers(folder, PAIRS, others)
    return {name: dict(sorted(tensors.items())) for name, tensors in layers.items()}


def read_layers(
    folder: Path, kinds: Sequence[Collection[str]], others: Collection[str] = ()
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Read the tensors of each layer from an adapter folder, on the CPU.

    Args:
        folder: the adapter folder.
        kinds: for each kind of layer, the endings of its tensors' names after the layer's name; each layer must have
            exactly the tensors of one kind.
        others: names of the tensors that belong to no layer; the file must have all of them.

    Returns:
        For each layer name, its tensors by suffix; and the other tensors by name.

    Raises:
        ModelError: the file is missing, damaged or a pickle; a tensor is missing, unexpected or not finite.
    """
    path = folder / TENSORS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(
                f"{folder}: adapter_model.bin is a pickle. Loading a pickle can run any code, so qlora does not read "
                f"it. Convert it with torch's restricted loader; run in that folder: {CONVERSION}"
            )
        raise ModelError(f"{folder}: {TENSORS_FILE} is missing. Restore the file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged, or not a safetensors file: {error}. Restore the file") from error
    layers: dict[str, dict[str, Tensor]] = {}
    experts = targets_beside(folder / CONFIG_FILE)
    suffixes = list(dict.fromkeys(suffix for kind in kinds for suffix in kind))
    for key, tensor in tensors.items():
        counts = key in others and not tensor.is_floating_point()  # such as the batches that a norm has seen
        if not counts and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ModelError(f"{path}: {key} holds numbers that are not finite; use an earlier checkpoint")
        if key in others:
            continue
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if key.endswith(".base_layer.weight"):
            raise ModelError(
                f"{path}: {key} is a weight of the base, which PEFT stores next to an adapted embedding. Save "
                "the adapter again, with PEFT's save_pretrained(folder, save_embedding_layers=False)"
            )
        if not key.startswith(PREFIX) or suffix is None:
            raise ModelError(
                f"{path}: unexpected tensor {key}: tensors of this method end in {' or '.join(suffixes)}. "
                "Restore the file, or save the adapter without this tensor"
            )
        name = layer_name(key[len(PREFIX) : -len(suffix)], experts)
        layers.setdefault(name, {})[suffix] = tensor
    for name, parts in layers.items():
        kind = max(kinds, key=lambda kind: len(parts.keys() & set(kind)))
        for suffix in {*kind} ^ parts.keys():
            problem = "is missing" if suffix in kind else "is unexpected beside the layer's other tensors"
            raise ModelError(f"{path}: {PREFIX}{name}{suffix} {problem}. Restore the file")
    for key in others:
        if key not in tensors:
            raise ModelError(f"{path}: {key} is missing. Restore the file")
    return layers, {key: tensors[key] for key in others}
