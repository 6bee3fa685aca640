"""The tensors of a full checkpoint, read one at a time: a folder of safetensors, or a hub id in the local cache.

Only headers are read until a tensor is asked for, so a checkpoint may be larger than memory.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora import bundled
from qlora.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a folder, that of a run of full training, bundled/<name>, or a cached hub id.

    Raises ModelError if there is none on this machine; nothing is downloaded.
    """
    folder = bundled.path(str(name)) if str(name).startswith("bundled/") else Path(name)
    if folder.is_dir():
        whole = folder / "model"
        return (
            whole if (whole / "config.json").is_file() and not (folder / "config.json").is_file() else folder
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ModelError(
            f"{name}: there is no such folder, and no such model in the local hub cache. Give a local folder, or "
            "download it first"
        ) from None


class Weights(Mapping[str, Tensor]):
    """The tensors of the checkpoint in `folder` by name, on the CPU; each look-up reads from disk.

    Raises ModelError if there are no safetensors, or a file of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self.file_bytes = 0
        for path in _shards(folder):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: missing, damaged, or no safetensors file: {error}") from error
            self.file_bytes += path.stat().st_size
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor holds codes that mean nothing without further tensors: integers, or 8-bit floats."""
        return self._files[name].get_slice(name).get_dtype() not in ("BF16", "F16", "F32", "F64")

    def of_layer(self, layer: str) -> str | None:
        """The name of a linear layer's weight; files of a model without its head lack the first part."""
        names = (f"{layer}.weight", f"{layer.partition('.')[2]}.weight")
        return next((name for name in names if name in self._files), None)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return sorted({folder / os.fspath(name) for name in names})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: cannot be read: {error}") from error
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = sorted(folder.glob("*.bin"))
    why = f"; {pickled[0].name} is a pickle, which is not read" if pickled else ""
    raise ModelError(f"{folder}: there is no {SINGLE_FILE} or {INDEX_FILE}{why}")
