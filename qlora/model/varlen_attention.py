"""Attention over documents that are concatenated in one row; each attends only to itself, without mask or padding.

transformers' models look up attention by the name in their config. `read_documents` sets our name. In a forward pass
with `document_lengths`, each document then attends only to itself: on a GPU in one kernel over all documents if flash
attention supports it (`flash_obstacle`), elsewhere in one call per document. If every row is a single document, the
lengths are empty, (), and the rows attend directly.
A forward pass without `document_lengths`, such as in generation, uses transformers' SDPA.

Capped scores, as in Gemma 2, are computed by `capped_attention` in every case, because neither SDPA nor torch's flash
attention knows a cap. `use_capped_attention` gives it to such a model in place of transformers' "eager" attention,
which keeps all scores of a row.
"""

from collections.abc import Mapping
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.errors import ModelError
from qlora.ops.capped_attention import capped_attention
from qlora.runtime import gpu
from qlora.runtime.device import on_cuda
from qlora.runtime.fake import represented_device

NAME = "qlora_documents"

CAPPED = "qlora_capped"
"""the same attention without documents, for models whose scores are capped"""

GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""flag for fewer heads in keys and values: torch 2.11 supports them without it, later versions require it"""


DEFAULTS = (
    ("use_cache", False), ("output_attentions", False), ("output_router_logits", False), ("is_causal", True),
)  # fmt: skip
"""keyword values that ask for the default behaviour"""


OTHER_KINDS = frozenset(
    {
        "window_attention", "indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
        "minimax_m3_sparse", "reference_sliding_attention",
    }
)  # fmt: skip
"""kinds of layers, named as in transformers' `layer_types`, that choose the tokens they see in another way than ours"""


def nondefault_keywords(keywords: Mapping[str, Any]) -> set[str]:
    """Return the keywords by which transformers asks a layer or its attention for more than the default behaviour."""
    return {name for name, value in keywords.items() if value is not None and (name, value) not in DEFAULTS}


def chunk_below(config: Any, longest: int | None) -> int | None:
    """Return the tokens of a chunk if layers attend in chunks, and documents of `longest` tokens (None: any) have more.

    Such a layer, as in Llama 4, sees only its own chunk; up to the length of one it sees the whole document.

    Args:
        config: the model's configuration; `attention_chunk_size` and `layer_types` are read.
        longest: tokens of the longest document.
    """
    text = config.get_text_config()
    if "chunked_attention" not in (getattr(text, "layer_types", None) or []):
        return None
    chunk = getattr(text, "attention_chunk_size", None)
    return chunk if isinstance(chunk, int) and (longest is None or longest > chunk) else None


def reads_documents(model: Any, longest: int | None = None) -> bool:
    """Return True if the model has attention over documents of up to `longest` tokens (None: any), or supports it."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if kinds & OTHER_KINDS or chunk_below(model.config, longest) is not None:
        return False
    attention = model.config._attn_implementation
    if attention not in ("sdpa", CAPPED):
        return bool(attention == NAME)
    return bool(model._supports_attention_backend) and not getattr(model, "_is_stateful", False)


def read_documents(model: Any, longest: int | None = None) -> None:
    """Switch the model to our attention over documents of up to `longest` tokens, in place, if it supports it."""
    if reads_documents(model, longest):
        model.set_attn_implementation(NAME)


def use_capped_attention(model: Any) -> None:
    """Switch a model whose scores are capped from transformers' "eager" attention to ours, in place."""
    capped = any(
        getattr(module, "attn_logit_softcapping", None) is not None and getattr(module, "is_causal", True)
        for module in model.modules()
    )
    if capped and model.config._attn_implementation == "eager" and model._supports_attention_backend:
        model.set_attn_implementation(CAPPED)


def _no_mask(device: torch.device) -> Tensor:
    """Return an empty four-dimensional mask, which transformers passes on unchanged.

    Without a mask, transformers would build one from the position ids, and the host would wait for the GPU before every
    forward pass.
    """
    return torch.empty(1, 1, 0, 0, device=device)


def whole_row_arguments(length: int, device: torch.device) -> dict[str, Any]:
    """Return the extra arguments of a forward pass in which every row is a single document."""
    positions = torch.arange(length, device=device)[None]
    return {"attention_mask": _no_mask(device), "position_ids": positions, "document_lengths": ()}


def arguments(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return the extra arguments of a forward pass over documents of these lengths, concatenated in one row."""
    return {
        "attention_mask": _no_mask(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(
            device, non_blocking=True
        ),
        "document_lengths": lengths,
        "document_ends": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(
            device, non_blocking=True
        ),
    }


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_lengths: tuple[int, ...] | None = None,
    document_ends: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention, over documents if `document_lengths` is given; transformers defines the signature.

    Args:
        module: the attention module of the layer.
        query: [B, heads, T, d].
        key: [B, heads, T, d], possibly with fewer heads.
        value: as `key`.
        attention_mask: only used without `document_lengths`.
        dropout: dropout of the attention weights.
        scaling: factor of the scores; None means 1/sqrt(d).
        sliding_window: number of tokens that a token attends to, including itself; None means all.
        softcap: bound of the scores; None means no bound.
        document_lengths: tokens of each document, T in total, with B = 1; or () if every row is a single document. None
            means transformers' own SDPA.
        document_ends: 0 and the end of each document, int32 on the device.
        others: further keywords of the model.

    Returns:
        Output [B, T, heads, d], and None for the attention weights.

    Raises:
        ModelError: attention over documents does not support one of `others`.
    """
    settings = dropout, scaling, sliding_window, softcap
    if document_lengths is None and softcap is not None:
        return _attend_alone(query, key, value, *settings, mask=attention_mask), None
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **others
        )  # fmt: skip
    _check_supported(module, others)
    if not document_lengths:
        return _attend_alone(query, key, value, *settings), None
    if on_cuda(query) and softcap is None and not dropout and _flash_runs(query, value):
        return _attend_all(
            query, key, value, document_ends, max(document_lengths), scaling, sliding_window
        ), None
    parts = (x.split(document_lengths, dim=2) for x in (query, key, value))
    alone = [_attend_alone(q, k, v, *settings) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(alone, dim=1), None


def _check_supported(module: nn.Module, others: dict[str, Any]) -> None:
    """Raise ModelError if a model asks its attention for something that we do not compute, such as sinks."""
    if unsupported := nondefault_keywords(others) - {
        "position_ids"
    }:  # document_lengths replaces the positions
        raise ModelError(
            f"{type(module).__name__} uses {', '.join(sorted(unsupported))}, which qlora's attention over packed rows "
            "does not support. Use another model"
        )


def flash_obstacle(
    capability: tuple[int, int], dtype: torch.dtype, width: int, value_width: int
) -> str | None:
    """Say why torch's flash attention cannot train on a GPU; None if it can.

    Source: `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` of torch; the kernel itself pads no heads, so their
    width must be a multiple of 8.

    Args:
        capability: compute capability of the GPU.
        dtype: dtype of queries, keys and values.
        width: features of a head in queries and keys.
        value_width: features of a head in values.
    """
    if capability < gpu.WITH_BFLOAT16:
        return f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if width != value_width:
        return f"queries have {width} features a head and values {value_width}, and it needs equal numbers"
    if width % 8 or width > 256:
        return f"a head has {width} features, and it needs a multiple of 8 up to 256"
    if 192 < width <= 224 and ((8, 6) <= capability <= (8, 9) or capability[0] == 12):
        return f"a head has {width} features, for which this GPU has no backward pass"
    return None


def _flash_runs(query: Tensor, value: Tensor) -> bool:
    capability = gpu.capability(represented_device(query.device))
    return flash_obstacle(capability, query.dtype, query.shape[-1], value.shape[-1]) is None


def _attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attend in all documents with one kernel: three [1, heads, T, d] -> [1, T, heads, d]."""
    varlen: Any = varlen_attn  # its signature differs between torch versions
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))  # [T, heads, d]
    behind = -1 if window is None else window - 1
    attended: Tensor = varlen(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(behind, 0), **GROUPED
    )
    return attended[None]


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask [T, T] of one document, True where the token of a row sees that of a column."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def _attend_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend in rows that are a single document each: three [B, heads, T, d] -> [B, T, heads, d].

    mask: [B, 1, T, T], bool or added to the scores, instead of the window; for capped scores only.
    """
    if softcap is not None:
        return capped_attention(
            query, key, value, softcap, scaling=scaling, window=window, mask=mask, dropout=dropout
        )
    length = query.shape[2]
    if window is not None and length > window:
        mask = visible(length, window, query.device)
    heads = query.shape[1]
    grouped = heads != key.shape[1]
    if grouped and on_cuda(query) and not (mask is None and _flash_runs(query, value)):
        # Torch's other fused kernel shares no heads of keys and values; without it all scores [T, T] are in memory
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=grouped,
    ).transpose(1, 2)  # fmt: skip


for name in (NAME, CAPPED):
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
