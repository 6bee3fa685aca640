"""An adapter alone as a GGUF file, which llama.cpp applies to the GGUF file of its base (`--lora`).

llama.cpp adds alpha / rank * B A to a weight, with the one alpha of the file and the rank of the tensors. So the
adapter is made plain first (see `qlora.adapter.algebra.plain`): each layer's own scaling becomes part of its numbers.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from qlora.adapter.algebra.plain import plain
from qlora.adapter.algebra.tensors import Adapter, adapter_folder, read
from qlora.adapter.config import CONFIG_FILE, read_fields
from qlora.adapter.trained_parts import has_parts
from qlora.errors import ModelError
from qlora.export.families import Settings
from qlora.export.gguf_model import Exported, check_space, gguf_writer, plan, require_gguf, write_heads
from qlora.export.gguf_tensors import TensorLayout, own_name, stored_bytes, stored_type, to_numpy
from qlora.inference.load import recipe_of
from qlora.model.load import load_config
from qlora.recipe import Base
from qlora.storage.draft import check_absent, drafting, publish
from qlora.storage.folders import save_errors

TYPES = ("f32", "f16", "bf16")
"""number formats of A and B"""


def write_adapter(
    path: str | Path, to: Path, *, kind: str = "f32", trust_remote_code: bool = False
) -> Exported:
    """Write the adapter in `path` into the new file `to`.

    Args:
        path: folder of a run or of an adapter, ours or PEFT's.
        to: the file; it must not exist, and appears only when it is complete.
        kind: number format of A and B, one of `TYPES`.
        trust_remote_code: allow the base to run its own code, if the recipe stored with the adapter asks for it.

    Raises:
        UsageError: the file exists, or the package gguf is missing.
        ModelError: llama.cpp cannot apply the adapter: its method, its layers or its base.
        SaveError: the file cannot be written. Nothing remains of it.
    """
    require_gguf()
    check_absent(to)
    folder = adapter_folder(path)
    adapter = read(folder)
    if has_parts(read_fields(folder / CONFIG_FILE)):
        raise ModelError(
            f"{folder}: tokens or modules were trained beside the adapter, which llama.cpp does not read. Export the "
            "merged model instead, without --adapter"
        )
    base = (
        recipe_of(folder, trust_remote_code=trust_remote_code).base
        if (folder / "recipe.yaml").is_file()
        else Base(model=str(adapter.base or ""))
    )
    layout = TensorLayout(Settings.of(load_config(base)))
    served, _ = plain(adapter)
    tensors = _tensors(served, layout)
    kinds = {name: stored_type(name, kind, (1, *tensor.shape[1:])) for name, tensor in tensors.items()}
    total = sum(stored_bytes(kinds[name], tuple(tensor.shape)) for name, tensor in tensors.items())
    check_space(to, total)
    with drafting(to) as drafts:
        file = drafts / "adapter.gguf"
        with save_errors(to), gguf_writer(file, layout.settings.family.arch) as writer:
            _describe(writer, folder, next(iter(served.layers.values())).alpha)
            for name, tensor in tensors.items():
                plan(writer, name, kinds[name], tuple(tensor.shape))
            write_heads(writer)
            for name, tensor in tensors.items():
                writer.write_tensor_data(to_numpy(name, tensor, kinds[name]))
        publish(file, to)
    notes = () if adapter.note is None else (adapter.note,)
    return Exported(to, total, len(tensors), kind, notes)


def _tensors(adapter: Adapter, layout: TensorLayout) -> dict[str, Tensor]:
    """Return A [rank, in] and B [out, rank] of each layer by llama.cpp's names; an embedding's A as [tokens, rank]."""
    tensors: dict[str, Tensor] = {}
    for layer, pair in adapter.layers.items():
        own = own_name(f"{layer}.weight")
        if own is None or pair.kernel:
            raise ModelError(f"{layer}: llama.cpp applies adapters to the layers of the text model only")
        name = layout.name(own)
        if layout.settings.config.tie_word_embeddings and own in ("lm_head.weight", "embed_tokens.weight"):
            raise ModelError(
                f"{layer}: the embedding and the output head share their weight, and llama.cpp would not apply the "
                "adapter to one of them alone. Export the merged model instead, without --adapter"
            )
        a = pair.a.T if own == "embed_tokens.weight" else pair.a
        b = layout.reordered(own, pair.b) if layout.rows_move(own) else pair.b
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
    return tensors


def _describe(writer: Any, folder: Path, alpha: float) -> None:
    from gguf import GGUFType, Keys

    writer.add_type(GGUFType.ADAPTER)
    writer.add_name((folder.resolve().parent if folder.name == "adapter" else folder.resolve()).name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
