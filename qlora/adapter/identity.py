"""What a base is known by, so that no adapter is used on another one unnoticed.

    qlora.json    beside PEFT's files: {"base": {name, revision, commit, weights, ...}, "format": 1}

Weights are known by their checkpoint on disk, not as they stand in memory: there, the dtype depends on the
device and so does NF4 in its last bits, but the same files are the same base everywhere. How they are quantized
is recorded beside them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from torch import nn

from qlora.errors import ModelError
from qlora.quantization.nf4 import is_nf4, quant_state
from qlora.storage.safetensors_files import StoredTensor, checkpoint_files, find_checkpoint, stored_tensors

IDENTITY_FILE = "qlora.json"
FORMAT = 1
"""version of the file's layout"""

COMPARED = ("weights", "quantization", "tokenizer", "template")
SAMPLES, SAMPLE_BYTES, WHOLE_BYTES = 16, 4096, 2**20


@dataclass(frozen=True)
class BaseIdentity:
    """A base as an adapter remembers it; None is unknown, and what is unknown is not compared.

    >>> BaseIdentity.of(load_base(recipe.base)).difference(BaseIdentity.read(Path("runs/mine/adapter")))
    """

    name: str | None = None
    """hub id, folder or bundled/<name>"""
    revision: str | None = None
    """branch, tag or commit that was asked for"""
    commit: str | None = None
    """what the hub gave"""
    weights: str | None = None
    """`checkpoint_digest`, or how they were made"""
    quantization: str | None = None
    """of the linears"""
    tokenizer: str | None = None
    """digest of its vocabulary"""
    template: str | None = None
    """digest of the chat template that rows were written with"""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The identity that `load_base` gave `model`; else what its configuration says it was loaded from."""
        known = getattr(model, "base_identity", None)
        if isinstance(known, cls):
            return known
        config = getattr(model, "config", None)
        name, commit = getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)
        weights = _weights_of(name, commit)
        return cls(name, commit=commit, weights=weights, quantization=quantization_of(model))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What `as_json` wrote beside an adapter; None for an adapter of PEFT's, which has no such file."""
        path = folder / IDENTITY_FILE
        if not path.exists():
            return None
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """The text of qlora.json, read back. Raises ValueError with what is wrong with it."""
        try:
            record = json.loads(text)
            known = {field.name for field in fields(cls)}
            base = {key: value for key, value in record["base"].items() if key in known}
            version, texts = record["format"], all(isinstance(v, str | None) for v in base.values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"cannot be read: {error}") from error
        if version != FORMAT or not texts:
            raise ModelError(f"format {version!r} is not one that this version of qlora reads")
        return cls(**base)

    def as_json(self) -> str:
        """The text of qlora.json."""
        return json.dumps({"base": asdict(self), "format": FORMAT}, indent=2, sort_keys=True) + "\n"

    def difference(self, other: "BaseIdentity") -> str | None:
        """The first thing in which the two are known to differ, with both sides; None if there is none.

        The same weights are the same base under any name. Where they are unknown, two names tell bases apart
        if both can only mean one thing: a folder's name says nothing about what is in it.
        """
        for key in COMPARED:
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine is not None and theirs is not None:
                if mine != theirs:
                    return f"{key}: {mine} there, {theirs} here"
            elif key == "weights" and _tells(self.name) and _tells(other.name) and self.name != other.name:
                return f"name: {self.name} there, {other.name} here"
        return None

    def __str__(self) -> str:
        version = self.commit or self.revision
        return (self.name or "a base without a name") + (f"@{version[:12]}" if version else "")


def require_same_base(recorded: BaseIdentity, found: BaseIdentity, folder: Path) -> None:
    """Raise ModelError, naming both, if the adapter in `folder` was trained on another base than `found`."""
    difference = recorded.difference(found)
    if difference is not None:
        raise ModelError(
            f"{folder}: the adapter was trained on {recorded}, and this base is {found}; they differ in "
            f"{difference}. Use the base it was trained on, or say that another will do: --any-base, in Python "
            "any_base=True"
        )


def digest(parts: Iterable[bytes]) -> str:
    """BLAKE2b-128 of byte strings, each with its length."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def checkpoint_digest(files: Sequence[Path]) -> str:
    """BLAKE2b-128 over the tensors of a checkpoint's safetensors files, however they are spread over the files.

    Of every tensor its name, dtype, shape and content: all of it up to 1 MiB, else 16 stretches of 4 KiB, evenly
    spread with the first and the last bytes among them. A 7B checkpoint takes 16 MB of reading. A change of a large
    tensor that leaves all its stretches alone, such as one row of an embedding, goes unnoticed.

    Raises:
        ModelError: a file is missing or not a safetensors file.
    """
    tensors = sorted(tensor for file in files for tensor in stored_tensors(file))
    return digest(part for tensor in tensors for part in _parts(tensor))


def _parts(tensor: StoredTensor) -> Iterator[bytes]:
    """What of a tensor goes into the digest."""
    yield json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode()
    size = tensor.stop - tensor.start
    if size <= WHOLE_BYTES:
        yield from tensor.stretches([0], size)
    else:
        last = size - SAMPLE_BYTES
        yield from tensor.stretches((last * index // (SAMPLES - 1) for index in range(SAMPLES)), SAMPLE_BYTES)


def _weights_of(name: str | None, commit: str | None) -> str | None:
    """The digest of a model's safetensors files; None if it has none here, or some are missing.

    commit: of a hub id; without one, its files cannot be told from those of another revision.
    """
    if name is None or not (Path(name).is_dir() or commit):
        return None
    try:
        folder = find_checkpoint(name, commit)
    except ModelError:
        return None
    files = checkpoint_files(folder)
    return checkpoint_digest(files) if files and all(file.is_file() for file in files) else None


def quantization_of(model: nn.Module) -> str | None:
    """How the linears of `model` are stored, in words; None for 4-bit linears that have no content yet."""
    states: list[Any] = [quant_state(module) for module in model.modules() if is_nf4(module)]
    if None in states:
        return None
    kinds = {
        f"{state.quant_type} in blocks of {state.blocksize}{', double quantization' * bool(state.nested)}"
        for state in states
    }
    return "; ".join(sorted(kinds)) or "none"


def _tells(name: str | None) -> bool:
    """Whether a name means one base only: an id of the hub or of the package, not a folder somewhere."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
