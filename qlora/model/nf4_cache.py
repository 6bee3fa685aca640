"""Cache of quantized bases: the next start reads 4 bits per weight instead of quantizing 16 bits again.

A cache entry is a checkpoint that transformers and bitsandbytes write and read: the packed weights and statistics, bit
for bit, and the rest in the compute dtype; with a file of ours for the experts of a mixture. It does not contain the
tokenizer.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from qlora.quantization import experts_file
from qlora.storage import cache, tensor_file

WORTH_BYTES = 100 * 2**20
"""Smallest base that is cached: a smaller one is quantized about as fast as it is read."""

_SHARD = "1GB"  # files are verified in parallel, and a GPU's tensors pass through the host one file at a time
_DECIDES = {".safetensors", ".bin", ".json"}  # suffixes of the files that determine a checkpoint
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
    """Return the model that `make` quantizes, from the second time on read from the cache with the same bits.

    Args:
        location: folder or hub id of the checkpoint.
        revision: branch, tag or commit of a hub id.
        block_size: number of weights that share an absmax.
        double_quant: True if the absmax values are quantized too.
        dtype: dtype of everything that is not quantized.
        device: device of the model. It is part of the cache key, because a GPU can round a statistic differently than
            a CPU does.
        make: loads and quantizes the checkpoint; its errors are passed on.
    """

    def key() -> str | None:
        identity = _identity(location, revision)
        return identity and cache.digest(
            checkpoint=identity,
            block_size=block_size,
            double_quant=double_quant,
            dtype=str(dtype),
            device=device.type,
            code_version=cache.code_version(
                *("model/load.py", "model/nf4_cache.py", "quantization"),
                libraries=("transformers", "bitsandbytes", "torch"),
            ),
        )

    return cache.cached(
        "base",
        key,
        make=make,
        save=_save,
        load=lambda folder: _load(folder, location, dtype, device),
        size=_bytes,
        about=f"{location}, blocks of {block_size}{', double quantization' * double_quant}, for {device.type}",
        min_bytes=WORTH_BYTES,
    )


def _save(model: PreTrainedModel, folder: Path) -> None:
    with experts_file.saved(model, folder):
        model.save_pretrained(folder, max_shard_size=_SHARD)
    tensor_file.give_usual_permissions(folder)


def _identity(location: str, revision: str) -> str | None:
    """Return a key of a checkpoint's content, or None if it cannot be read; loading it then raises the error."""
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
    """Return a key of a file's content without reading all of it.

    The key contains the time of the last change of any kind (ctime), because only the system sets it; `cp -p` and `tar`
    set the modification time. It also contains a hash of both ends of the file: the header and some weights.
    """
    status = file.stat()
    with file.open("rb") as stream:
        ends = hashlib.sha256(stream.read(_END_BYTES))
        stream.seek(max(0, status.st_size - _END_BYTES))
        ends.update(stream.read(_END_BYTES))
    return [file.name, status.st_size, status.st_ctime_ns, ends.hexdigest()]


def _bytes(model: PreTrainedModel) -> int:
    tensors = {
        tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()
    }  # tied tensors count once
    return sum(tensors.values())


def _load(folder: Path, location: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with experts_file.loading(folder, device) as add_experts:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, local_files_only=True, output_loading_info=True
        )
        add_experts(model)
    differences = {problem: sorted(names) for problem, names in report.items() if names}
    if differences:
        raise ValueError(f"the cached checkpoint does not fit the model: {differences}")
    model.name_or_path = model.config.name_or_path = location
    return model
