"""Finds, reads and writes the safetensors files of a model.

    model.safetensors                      or, for a larger model,
    model-00001-of-00065.safetensors ...   and model.safetensors.index.json, which maps tensors to files

The whole model is never in memory: a read holds one tensor, a write one shard.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora import bundled
from qlora.errors import ModelError
from qlora.storage import regular_file, tensor_file
from qlora.storage.folders import save_errors

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")
SHARD_BYTES = 2**30
"""maximum size of a shard; a larger tensor gets a shard for itself"""

DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
"""files of a hub model that are downloaded"""


def find_checkpoint(name: str | Path, revision: str | None = None, *, download: bool = False) -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: a model folder, the folder of a full-training run, bundled/<name>, or a hub id.
        revision: branch, tag or commit of the hub id.
        download: download the files of a hub id that the local hub cache lacks.

    Raises:
        ModelError: without `download`, the checkpoint is not on this machine.
        OSError, ValueError: with `download`, errors of the hub.
    """
    folder = bundled.path(str(name)) if str(name).startswith("bundled/") else Path(name)
    if folder.is_dir():
        whole = folder / "model"
        return (
            whole if (whole / "config.json").is_file() and not (folder / "config.json").is_file() else folder
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if download:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=DOWNLOADED))
    try:
        return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ModelError(
            f"{name}: there is no such folder, and no such model in the local hub cache. Give a local folder, or "
            "download the model first"
        ) from None


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, from its index if it has one; [] if there are none.

    Raises:
        ModelError: the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / WHOLE] if (folder / WHOLE).is_file() else []
    try:
        shards = json.loads(regular_file.read_text(index))["weight_map"].values()
        return sorted({folder / shard for shard in shards})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{index}: cannot be read as an index of safetensors files ({error!r}). Restore the file"
        ) from error


class StoredTensor(NamedTuple):
    """Metadata of a tensor, from the header of its file."""

    name: str
    dtype: str
    """safetensors' name of the dtype, such as BF16"""
    shape: tuple[int, ...]
    file: Path
    start: int
    """offset of its first byte in the file"""
    stop: int
    """offset after its last byte"""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """True if the elements are integers or 8-bit floats: codes that need further tensors to be decoded."""
        return self.dtype not in FLOATS

    def read(self) -> Tensor:
        """Read the tensor, to the CPU.

        Raises:
            ModelError: the file cannot be read.
        """
        # opened for each tensor, because an open file keeps everything that was read from it mapped
        with _reading(self.file), safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.name)

    def byte_ranges(self, offsets: Iterable[int], size: int) -> Iterator[bytes]:
        """Yield `size` bytes of the tensor from each offset.

        Raises:
            ModelError: the file cannot be read.
        """
        with _reading(self.file), self.file.open("rb") as stream:
            for offset in offsets:
                stream.seek(self.start + offset)
                yield stream.read(size)


def stored_tensors(file: Path) -> list[StoredTensor]:
    """Read the header of a safetensors file, and return its tensors sorted by name.

    Raises:
        ModelError: the file is missing, truncated, or not a safetensors file.
    """
    with _reading(file):
        with safe_open(file, framework="pt"):
            pass  # checks dtypes, shapes, offsets and the file size; it does not give the offsets
        with file.open("rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(begin - 8))
    header.pop("__metadata__", None)
    return [
        StoredTensor(
            name, at["dtype"], tuple(at["shape"]), file, *(begin + end for end in at["data_offsets"])
        )
        for name, at in sorted(header.items())
    ]


class ShardReader(Mapping[str, Tensor]):
    """Mapping from the names of a checkpoint's tensors, in the order of its files, to tensors read from disk.

    Only headers are read until a tensor is looked up, so a checkpoint can be larger than memory.

    Raises:
        ModelError: there is no safetensors file, or one is missing or damaged.

    Examples:
        >>> reader = ShardReader(folder)
        >>> for name, tensor in reader.items(): ...
        >>> reader.stored[name].shape
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = checkpoint_files(folder)
        if not self.files:
            pickled = sorted(folder.glob("*.bin"))
            hint = (
                f": its weights are in {pickled[0].name}, a pickle, which qlora does not read"
                if pickled
                else ""
            )
            raise ModelError(
                f"{folder}: there is no {WHOLE} and no {INDEX}{hint}. Load the model with transformers, and "
                "write safetensors with its save_pretrained"
            )
        self.stored = {tensor.name: tensor for file in self.files for tensor in stored_tensors(file)}

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # Mapping would read the tensor

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read several tensors, and open each file once; their memory is that of the files until all are gone.

        Raises:
            ModelError: a file cannot be read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.stored[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            with _reading(file), safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in inside}
        return tensors

    def layer_weight(self, layer: str) -> StoredTensor | None:
        """Return the weight of a linear layer; None if there is none.

        Files of a model without its head lack the first part of the name.
        """
        names = (f"{layer}.weight", f"{layer.partition('.')[2]}.weight")
        return next((self.stored[name] for name in names if name in self.stored), None)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        regular_file.check(file)
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{file}: missing or damaged: {error}. Restore the file") from error


class ShardWriter:
    """Writes tensors to the shards of a checkpoint; a shard is written when the next tensor would exceed its size.

    File names and index are those of transformers.

    Raises:
        SaveError: a shard cannot be written.

    Examples:
        >>> with ShardWriter(folder) as writer:
        ...     writer.add("lm_head.weight", weight)
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
        """Add a tensor, from any device."""
        if self._held and self._held_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _write(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1}"
        with save_errors(path):
            tensor_file.write(path, self._held, {"format": "pt"})
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
