"""Adapter tensors under PEFT's names, in PEFT's file."""

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora.errors import ModelError

TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CONVERSION = (
    'python -c "import torch, safetensors.torch as s; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.contiguous().clone() for k, v in t.items()}, 'adapter_model.safetensors')\""
)
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


def named_tensors(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all layers by their names in the file, on the CPU.

    Args:
        layers: for each layer name, its tensors by suffix, such as ".lora_A.weight".

    Raises:
        ModelError: a number is not finite.
    """
    tensors = {}
    for name, parts in layers.items():
        for suffix, tensor in parts.items():
            if not tensor.isfinite().all():
                raise ModelError(
                    f"{name}{suffix} is not finite: nothing was saved. Train again with a lower optimizer.lr"
                )
            tensors[PREFIX + name + suffix] = tensor.detach().cpu().contiguous()
    return tensors


def read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read A [rank, in] and B [out, rank] of each layer, on the CPU. Raises ModelError as `read_layers` does."""
    layers = read_layers(folder, (SUFFIX_A, SUFFIX_B))
    return {name: (tensors[SUFFIX_A], tensors[SUFFIX_B]) for name, tensors in layers.items()}


def read_layers(folder: Path, suffixes: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of each layer from an adapter folder, on the CPU.

    Args:
        folder: the adapter folder.
        suffixes: endings of the tensor names after the layer's name; each layer must have exactly these tensors.

    Returns:
        For each layer name, its tensors by suffix.

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
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if not key.startswith(PREFIX) or suffix is None:
            raise ModelError(
                f"{path}: unexpected tensor {key}: tensors of this method end in {' or '.join(suffixes)}. "
                "Restore the file, or save the adapter without this tensor"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ModelError(f"{path}: {key} holds numbers that are not finite; use an earlier checkpoint")
        layers.setdefault(key[len(PREFIX) : -len(suffix)], {})[suffix] = tensor
    for name, parts in layers.items():
        for suffix in suffixes:
            if suffix not in parts:
                raise ModelError(f"{path}: {PREFIX}{name}{suffix} is missing. Restore the file")
    return layers
