"""The tensors of an adapter as PEFT names and stores them."""

from collections.abc import Mapping
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


def named_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A [rank, in] and B [out, rank] of each layer under PEFT's names, on the CPU.

    Raises:
        ModelError: a number is not finite.
    """
    tensors = {}
    for name, pair in pairs.items():
        for suffix, tensor in zip((SUFFIX_A, SUFFIX_B), pair, strict=True):
            if not tensor.isfinite().all():
                raise ModelError(f"{name}{suffix} is not finite: nothing was saved")
            tensors[PREFIX + name + suffix] = tensor.detach().cpu().contiguous()
    return tensors


def read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read A [rank, in] and B [out, rank] by layer name, on the CPU.

    Raises:
        ModelError: the file is missing, damaged or a pickle, or holds something else than pairs of finite numbers.
    """
    path = folder / TENSORS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(
                f"{folder}: adapter_model.bin is a pickle, which can run any code when it is read, so it is "
                f"not read. Convert it with torch's restricted reader, in that folder: {CONVERSION}"
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
