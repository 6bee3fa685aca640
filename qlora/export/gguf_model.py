"""A model as one GGUF file, which llama.cpp, Ollama and LM Studio read."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import SaveError, UsageError
from qlora.export.gguf_tensors import TensorLayout, stored_bytes, stored_type, to_numpy
from qlora.export.source import ModelSource
from qlora.merging.merge import Progress
from qlora.storage.draft import check_absent, drafting, publish
from qlora.storage.folders import free_bytes, save_errors

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GiB = 2**30


@dataclass(frozen=True)
class Exported:
    """A file or folder that was written for another program."""

    path: Path
    bytes: int
    """of tensors"""
    tensors: int
    kind: str
    """number format of the matrices"""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "tensors": self.tensors,
            "type": self.kind,
            "notes": list(self.notes),
        }


def require_gguf() -> None:
    """Raise UsageError if the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            "GGUF files need the package gguf; install it with: pip install 'qlora-train[export]'"
        ) from error


def write_model(
    source: ModelSource,
    to: Path,
    *,
    kind: str = "bf16",
    progress: Progress = lambda what, done, total: None,
) -> Exported:
    """Write a model into the new file `to`, tensor by tensor.

    Args:
        source: the model.
        to: the file; it must not exist, and appears only when it is complete.
        kind: number format of the matrices, one of `gguf_tensors.TYPES`. Vectors are always f32.
        progress: called for each tensor.

    Raises:
        UsageError: the file exists, or the package gguf is missing.
        ModelError: llama.cpp cannot run the model or read its tokenizer.
        SaveError: the file cannot be written. Nothing remains of it.
    """
    check_absent(to)
    with drafting(to) as drafts:
        written = draft_model(source, drafts / "model.gguf", to, kind=kind, progress=progress)
        publish(drafts / "model.gguf", to)
    return Exported(to, written.bytes, written.tensors, kind, written.notes)


def draft_model(source: ModelSource, file: Path, to: Path, *, kind: str, progress: Progress) -> Exported:
    """Write a model into a file that the caller publishes as `to`; see `write_model`."""
    require_gguf()
    layout, vocabulary = TensorLayout(source.settings), source.vocabulary
    planned = {
        name: (layout.name(name), stored_type(name, kind, shape), shape)
        for name, shape in source.shapes.items()
    }
    total = sum(stored_bytes(stored, shape) for _, stored, shape in planned.values())
    check_space(to, total)
    with save_errors(to), gguf_writer(file, source.settings.family.arch) as writer:
        _write_origin(writer, source, kind)
        source.settings.write(writer)
        writer.add_vocab_size(len(vocabulary.tokens))
        vocabulary.write(writer)
        if source.template is not None:
            writer.add_chat_template(source.template)
        factors = layout.rotation_factors()
        if factors is not None:
            plan(writer, "rope_freqs.weight", stored_type("rope_freqs", "f32", factors.shape), factors.shape)
        for name, stored, shape in planned.values():
            plan(writer, name, stored, shape)
        write_heads(writer)
        if factors is not None:
            writer.write_tensor_data(factors.float().numpy())
        for done, (own, tensor) in enumerate(source.tensors(), 1):
            name, stored, shape = planned[own]
            assert tuple(tensor.shape) == shape, f"{own} is {list(tensor.shape)}, not {list(shape)}"
            writer.write_tensor_data(to_numpy(name, layout.tensor(own, tensor), stored))
            progress("writing tensors", done, len(planned))
    return Exported(file, total, len(planned), kind, source.notes)


@contextmanager
def gguf_writer(file: Path, arch: str) -> Iterator["GGUFWriter"]:
    """Open a GGUFWriter, and close it in the end.

    Raises:
        OSError: the file cannot be written; numpy's error for a full disk, which has no number, gets one.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(file, arch)
    try:
        yield writer
    except OSError as error:
        if error.errno is None:  # "9 requested and 3 written"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        writer.close()


def check_space(file: Path, needed: int) -> None:
    """Raise SaveError if the disk has too little room for a file of about `needed` bytes."""
    free = free_bytes(file.absolute())
    if needed > free:
        raise SaveError(
            f"cannot write {file}: it needs {needed / GiB:.2f} GiB, and {free / GiB:.2f} GiB are free there. Free some "
            "space, or write another place"
        )


def plan(writer: "GGUFWriter", name: str, kind: "GGMLQuantizationType", shape: tuple[int, ...]) -> None:
    """Announce a tensor, so that its data can follow later."""
    import numpy as np

    writer.add_tensor_info(name, shape, np.dtype(np.float32), stored_bytes(kind, shape), raw_dtype=kind)


def write_heads(writer: "GGUFWriter") -> None:
    """Write everything that comes before the data of the tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_origin(writer: "GGUFWriter", source: ModelSource, kind: str) -> None:
    from gguf import GGUFType, LlamaFileType

    files = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type(GGUFType.MODEL)
    writer.add_name(source.name)
    writer.add_file_type(files[kind])
    writer.add_quantization_version(2)
