"""Names, order and offsets that llama.cpp wants for the tensors of a model and of its adapter."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qlora.errors import ModelError
from qlora.export.families import Settings

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# The end of a tensor's name that is the same in all checkpoints: their prefixes differ with their age
_KNOWN = re.compile(r"(?:^|\.)((?:layers\.\d+\..+|embed_tokens|norm)\.(?:weight|bias)|lm_head\.weight)$")
_FOREIGN = re.compile(r"(?:^|\.)(vision_tower|vision_model|multi_modal_projector)\.")

TYPES = ("bf16", "f16", "f32", "q8_0")
"""number formats of a model's matrices; vectors are always f32"""


def own_name(key: str) -> str | None:
    """Return the name of a checkpoint's tensor in a text model, such as `layers.0.mlp.up_proj.weight`.

    None for a tensor of the part that reads images.

    Raises:
        ModelError: the name is none of a decoder's.
    """
    if _FOREIGN.search(key):
        return None
    found = _KNOWN.search(key)
    if found is None:
        raise ModelError(f"{key}: llama.cpp has no such tensor in the families that qlora exports")
    return found[1]


class TensorLayout:
    """Translates the tensors of a text model from transformers' layout to llama.cpp's."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def _names(self) -> "dict[str, tuple[object, str]]":
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.settings.family.arch)
        return get_tensor_name_map(arch, self.settings.config.num_hidden_layers).mapping  # type: ignore[return-value]

    def name(self, own: str) -> str:
        """Return llama.cpp's name of a tensor, such as `blk.0.ffn_up.weight`.

        Raises:
            ModelError: llama.cpp has no such tensor in this architecture.
        """
        stem, _, kind = own.rpartition(".")
        found = self._names.get(stem if stem == "lm_head" else f"model.{stem}")
        if found is None:
            family = self.settings.family
            raise ModelError(f"{own}: llama.cpp has no such tensor in {family.name} ({family.arch})")
        return f"{found[1]}.{kind}"

    def tensor(self, own: str, tensor: Tensor) -> Tensor:
        """Return a tensor as llama.cpp stores it. A matrix is [out, in]."""
        if self.rows_move(own):
            return self.reordered(own, tensor)
        offset = self.settings.family.norm_offset
        if offset and own.endswith("norm.weight"):
            return tensor.float() + offset
        return tensor

    def rows_move(self, own: str) -> bool:
        """Return True if the rows of a tensor (of queries or keys) are in another order in llama.cpp."""
        return self.settings.family.interleaved and re.search(r"\.[qk]_proj\.", own) is not None

    def reordered(self, own: str, tensor: Tensor) -> Tensor:
        """Put the rows of queries or keys [heads * size, ...] into llama.cpp's order.

        transformers pairs the first half of a head's rows with the second for the rotation; llama.cpp pairs neighbours.
        """
        heads = self.settings.heads[".k_proj." in own]
        halves = tensor.unflatten(0, (heads, 2, self.settings.head_size // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    def rotation_factors(self) -> Tensor | None:
        """Return the factors [size / 2] by which Llama 3.1 and later divide the rotation's frequencies, or None."""
        if self.settings.rope["rope_type"] != "llama3":
            return None
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.settings.config, torch.device("cpu"))
        size = self.settings.head_size
        plain = self.settings.rope["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
        return plain / scaled


def stored_type(name: str, kind: str, shape: Sequence[int]) -> "GGMLQuantizationType":
    """Return the number format of a tensor in a file of this kind: f32 for vectors, f16 where q8_0 cannot be."""
    from gguf import GGMLQuantizationType as Type
    from gguf.constants import GGML_QUANT_SIZES

    if len(shape) == 1:
        return Type.F32
    wanted = Type[kind.upper()]
    return Type.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def stored_bytes(kind: "GGMLQuantizationType", shape: Sequence[int]) -> int:
    """Return the bytes of a tensor in this number format."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def to_numpy(name: str, tensor: Tensor, kind: "GGMLQuantizationType") -> np.ndarray:
    """Return the bytes of a tensor in this number format, as a numpy array.

    Raises:
        ModelError: a number is too large for f16, or not finite.
    """
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quantize

    if not tensor.isfinite().all():
        raise ModelError(f"{name}: holds numbers that are not finite")
    if kind == Type.BF16:
        return tensor.bfloat16().contiguous().view(torch.int16).numpy()
    if kind == Type.F16:
        half = tensor.half().contiguous()
        if not half.isfinite().all():
            raise ModelError(f"{name}: holds numbers that are too large for f16; use --type bf16 or f32")
        return half.numpy()
    whole = tensor.float().contiguous().numpy()
    return whole if kind == Type.F32 else quantize(whole, kind)
