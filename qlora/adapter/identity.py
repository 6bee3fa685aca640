"""Fingerprint of a base model, so that an adapter is never used on another one unnoticed.

    qlora.json    next to PEFT's files: {"base": {name, revision, commit, weights, ...}, "format": 1}

The fingerprint covers the weights in the checkpoint files, not in memory. In memory the dtype and the last bits of NF4
depend on the device, but the same files are the same base everywhere. The quantization is recorded separately. A plain
module has no files, so its fingerprint covers its weights in memory (base_digest.py).
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from torch import nn

from qlora.adapter import architecture
from qlora.adapter.architecture import architecture_of
from qlora.adapter.base_digest import memory_digest
from qlora.adapter.digest import digest, sampled
from qlora.errors import ModelError
from qlora.quantization.expert_stack import expert_stacks
from qlora.quantization.nf4 import is_nf4, quant_state
from qlora.storage import regular_file
from qlora.storage.safetensors_files import StoredTensor, checkpoint_files, find_checkpoint, stored_tensors

IDENTITY_FILE = "qlora.json"
FORMAT = 1
"""version of the layout of qlora.json"""

COMPARED = ("weights", "quantization", "tokenizer", "template")


@dataclass(frozen=True)
class BaseIdentity:
    """Fingerprint of a base model. A field that is None is unknown and is not compared.

    Examples:
        >>> BaseIdentity.of(load_base(recipe.base)).difference(BaseIdentity.read(Path("runs/mine/adapter")))
    """

    name: str | None = None
    """hub id, folder or bundled/<name>"""
    revision: str | None = None
    """branch, tag or commit that was requested"""
    commit: str | None = None
    """commit that the hub delivered"""
    weights: str | None = None
    """`checkpoint_digest`; the seed of random weights; or `memory_digest` of a module without files"""
    quantization: str | None = None
    """storage of the linear weights, see `quantization_of`"""
    tokenizer: str | None = None
    """digest of the tokenizer's vocabulary"""
    template: str | None = None
    """digest of the chat template that formatted the training rows"""
    architecture: str | None = None
    """values of the configuration that change the result, see `architecture_of`"""
    changed: str | None = None
    """change to the weights before training, see `InitialValues.changed`; None: they are those of the files"""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the fingerprint that `load_base` attached to `model`, or else one from its configuration or weights.

        A module without the name of a checkpoint is known by its weights in memory, as they were before the adapter.
        """
        known = getattr(model, "base_identity", None)
        if isinstance(known, cls):
            return known
        config = getattr(model, "config", None)
        name, commit = getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)
        weights = memory_digest(model) if name is None else _weights_of(name, commit)
        return cls(
            name,
            commit=commit,
            weights=weights,
            quantization=quantization_of(model),
            architecture=architecture_of(config),
        )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the qlora.json of an adapter folder; None for an adapter of PEFT, which has no such file."""
        path = folder / IDENTITY_FILE
        if not path.exists():
            return None
        try:
            return cls.parse(regular_file.read_text(path))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text of qlora.json. Raises ModelError if it is damaged or has an unknown format."""
        try:
            record = json.loads(text)
            known = {field.name for field in fields(cls)}
            base = {key: value for key, value in record["base"].items() if key in known}
            version, texts = record["format"], all(isinstance(v, str | None) for v in base.values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"the fingerprint of the base cannot be read: {error}. Restore the file"
            ) from error
        if version != FORMAT or not texts:
            raise ModelError(
                f"the fingerprint of the base: format {version!r} is not supported by this version of qlora. Update "
                "qlora, or restore the file"
            )
        return cls(**base)

    def as_json(self) -> str:
        """Return the text of qlora.json."""
        return json.dumps({"base": asdict(self), "format": FORMAT}, indent=2, sort_keys=True) + "\n"

    def difference(self, other: "BaseIdentity") -> str | None:
        """Return the first known difference with both values, that of self first; None if there is none.

        Equal weights mean the same base under any name. If the weights are unknown, names are compared, but only
        names that identify one base. A folder's name does not identify its content.
        """
        if self.changed != other.changed:
            mine, theirs = (
                f"changed by {one}" if one else "unchanged" for one in (self.changed, other.changed)
            )
            return f"the weights before training: {mine} and {theirs}"
        for key in COMPARED:
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine is not None and theirs is not None:
                if mine != theirs:
                    return f"{key}: {mine} and {theirs}"
            elif (
                key == "weights"
                and _is_unique(self.name)
                and _is_unique(other.name)
                and self.name != other.name
            ):
                return f"name: {self.name} and {other.name}"
        if self.architecture is not None and other.architecture is not None:
            found = architecture.difference(self.architecture, other.architecture)
            return None if found is None else f"architecture: {found}"
        return None

    def __str__(self) -> str:
        version = self.commit or self.revision
        return (self.name or "an unnamed base") + (f"@{version[:12]}" if version else "")


def require_same_base(recorded: BaseIdentity, loaded: BaseIdentity, folder: Path) -> None:
    """Raise ModelError if the adapter in `folder` was trained on another base than `loaded`."""
    difference = recorded.difference(loaded)
    if difference is not None:
        raise ModelError(
            f"{folder}: the adapter was trained on {recorded}, and this base is {loaded}; they differ in "
            f"{difference}. Use the base it was trained on, or accept another base with --any-base (in Python: "
            "any_base=True)"
        )


def checkpoint_digest(files: Sequence[Path]) -> str:
    """Return the BLAKE2b-128 digest of a checkpoint's tensors, independent of their distribution over the files.

    The digest covers the name, dtype, shape and content of each tensor: the whole content up to 1 MiB, or else 16
    samples of 4 KiB, evenly spread from the first to the last byte. It reads 16 MB of a 7B checkpoint. A change between
    the samples of a large tensor goes unnoticed, for example in one row of an embedding.

    Args:
        files: all safetensors files of the checkpoint.

    Raises:
        ModelError: a file is missing or not a safetensors file.
    """
    tensors = sorted(tensor for file in files for tensor in stored_tensors(file))
    return digest(part for tensor in tensors for part in _parts(tensor))


def _parts(tensor: StoredTensor) -> Iterator[bytes]:
    """Yield the parts of a tensor that the digest covers."""
    yield json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode()
    yield from tensor.byte_ranges(*sampled(tensor.stop - tensor.start))


def _weights_of(name: str | None, commit: str | None) -> str | None:
    """Return the digest of a model's local safetensors files; None if there are none, or some are missing.

    A hub id needs a commit: without it, files of different revisions cannot be distinguished.
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
    """Describe the storage of the linears of `model`; None if 4-bit linears have no content yet."""
    states: list[Any] = [quant_state(module) for module in model.modules() if is_nf4(module)]
    if None in states:
        return None
    linears = {in_4_bits(state.quant_type, state.blocksize, double=bool(state.nested)) for state in states}
    packed = [stack.storage for stack in expert_stacks(model).values() if stack.packed]
    experts = {in_4_bits("nf4", stack.block_size, double=stack.scales is not None) for stack in packed}
    return quantization_text(linears, experts)


UNQUANTIZED = "none"
"""`quantization` of a base without 4-bit linears"""

EXPERTS_IN = "experts in "
"""precedes the storage of experts in 4 bits in `quantization`; without it, experts are in 16 bits"""


def quantization_text(linears: Iterable[str], experts: Iterable[str]) -> str:
    """Return `quantization` of a base with linear layers, and experts, in these kinds of 4 bits (see `in_4_bits`)."""
    return "; ".join([*sorted(linears), *(f"{EXPERTS_IN}{kind}" for kind in sorted(experts))]) or UNQUANTIZED


def in_4_bits(kind: str, block_size: int, *, double: bool) -> str:
    """Describe 4-bit linears: their data type, the size of a block, and whether the absmax is quantized too."""
    return f"{kind} in blocks of {block_size}{', double quantization' * double}"


def _is_unique(name: str | None) -> bool:
    """Return True if a name identifies one base: an id of the hub or of the package, not a folder."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
