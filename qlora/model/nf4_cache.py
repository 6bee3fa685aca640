"""Quantized bases, kept from one start to the next: reading 4 bits a weight instead of quantizing 16 again.

What is kept is a checkpoint as transformers and bitsandbytes write one, so its reader is theirs too: packed
weights and statistics, bit for bit, and the rest in the compute dtype. The tokenizer is not in it.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from qlora.storage import cache

WORTH_BYTES = 100 * 2**20
"""A smaller base is quantized about as fast as it is read."""

_SHARD = (
    "1GB"  # files are verified side by side, and a GPU's tensors pass through the host one file at a time
)
_DECIDES = {".safetensors", ".bin", ".json"}  # suffixes of a checkpoint's weights and settings
_END_BYTES = 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")


def quantized(
    location: str,
    revision: str,
    *,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """What `make` quantizes, on `device`; from the second time on it is read from the cache, with the same bits.

    Args:
        location: the checkpoint: a folder or a hub id.
        revision: branch, tag or commit of a hub id.
        block_size: weights that share a constant.
        double_quant: whether the constants are quantized too.
        dtype: of what is not quantized.
        device: where the model is to be; a GPU may round a statistic otherwise than a CPU does.
        make: reads and quantizes the checkpoint. What it raises is raised.
    """

    def key() -> str | None:
        identity = _identity(location, revision)
        return identity and cache.digest(
            checkpoint=identity,
            block_size=block_size,
            double_quant=double_quant,
            dtype=str(dtype),
            device=device.type,
            made_by=cache.made_by(
                *("model/load.py", "model/nf4_cache.py", "quantization"),
                libraries=("transformers", "bitsandbytes", "torch"),
            ),
        )

    return cache.cached(
        "base",
        key,
        make=make,
        save=lambda model, folder: model.save_pretrained(folder, max_shard_size=_SHARD),
        load=lambda folder: _load(folder, location, dtype, device),
        size=_bytes,
        about=f"{location}, blocks of {block_size}{', double quantization' * double_quant}, for {device.type}",
        worth_bytes=WORTH_BYTES,
    )


def _identity(location: str, revision: str) -> str | None:
    """Names a checkpoint's content; None where it cannot be found or read: whoever loads it says why."""
    folder = Path(location)
    try:
        if folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.suffix in _DECIDES and file.is_file())
            return cache.digest(files=[_file(file) for file in files])
        snapshot = Path(cached_file(location, "config.json", revision=revision)).parent
    except (OSError, ValueError):
        return None
    return snapshot.name if _COMMIT.fullmatch(snapshot.name) else None


def _file(file: Path) -> list[Any]:
    """Tells a file from another without reading all of it.

    The time is that of the last change of any kind (ctime): unlike the content's own, which `cp -p` and `tar`
    set, it is the system's alone. The ends of a file hold its header and some weights.
    """
    status = file.stat()
    with file.open("rb") as stream:
        ends = hashlib.sha256(stream.read(_END_BYTES))
        stream.seek(max(0, status.st_size - _END_BYTES))
        ends.update(stream.read(_END_BYTES))
    return [file.name, status.st_size, status.st_ctime_ns, ends.hexdigest()]


def _bytes(model: PreTrainedModel) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}  # tied ones once
    return sum(tensors.values())


def _load(folder: Path, location: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, local_files_only=True, output_loading_info=True
    )
    differences = {problem: sorted(names) for problem, names in report.items() if names}
    if differences:
        raise ValueError(f"it does not fit the model: {differences}")
    model.name_or_path = model.config.name_or_path = location
    return model
