"""A model's safetensors files, read tensor by tensor and written shard by shard.

    model.safetensors                      or, of a larger model,
    model-00001-of-00065.safetensors ...   and model.safetensors.index.json, which says where each tensor is

Neither way does the whole model stand in memory: reading takes one tensor, writing holds one shard.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora.errors import ModelError, SaveError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**30
"""A tensor larger than this has a shard of its own."""


class ShardReader:
    """The tensors of a checkpoint's folder by name, in the order of its files.

        >>> reader = ShardReader(folder)
        >>> for name in reader:
        ...     tensor = reader.read(name)

    Raises ModelError if there is no safetensors file, or one is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for file in _files_of(folder):
            with self._opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118  (no dictionary)
                    header = opened.get_slice(name)
                    elements = math.prod(header.get_shape())
                    self._entries[name] = _Entry(file, str(header.get_dtype()), elements)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU. Raises ModelError if it cannot be read."""
        # Opened for each tensor: a file that stays open keeps all that was read of it mapped
        with self._opened(self._entries[name].file) as opened:
            return opened.get_tensor(name)

    def elements(self, name: str) -> int:
        """How many numbers the tensor `name` holds."""
        return self._entries[name].elements

    def dtype(self, name: str) -> str:
        """The dtype of the tensor `name` in safetensors' words, as BF16."""
        return self._entries[name].dtype

    @contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.folder / file}: missing or damaged: {error}") from error


class _Entry(NamedTuple):
    """What a file's header says of a tensor."""

    file: str
    dtype: str
    elements: int


class ShardWriter:
    """Writes tensors into `folder` as they come; a shard goes to disk when the next tensor would not fit.

        >>> with ShardWriter(folder) as writer:
        ...     writer.add("lm_head.weight", weight)

    Names and index are as transformers writes them. Raises SaveError if the disk refuses.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.total_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take `tensor`, of any device."""
        if self._held and self._held_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _write(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1}"
        try:
            save_file(self._held, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise SaveError(f"cannot write {path}: {error}") from error
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _finish(self) -> None:
        self._write()
        count = len(self._shards)
        if count == 1:
            (self.folder / "shard-1").rename(self.folder / WHOLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files_of(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return sorted({str(file) for file in index["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder / INDEX}: no index of safetensors files: {error!r}") from error
    if (folder / WHOLE).is_file():
        return [WHOLE]
    pickled = sorted(folder.glob("*.bin"))
    hint = f": its weights are in {pickled[0].name}, which is not read tensor by tensor" if pickled else ""
    raise ModelError(
        f"{folder}: there is no {WHOLE} and no {INDEX}{hint}. Load the model with transformers and "
        "save_pretrained it: that writes safetensors"
    )
