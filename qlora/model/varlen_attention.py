"""Attention over documents that lie end to end in one row: each sees itself alone, without mask or padding.

transformers' models call attention by the name in their config. `read_documents` gives ours to a model; where a
pass then comes with `document_lengths`, each document attends on its own: in one kernel over all of them on a
GPU, one call a document elsewhere. Rows that are one document each come with no lengths, (), and attend as they are.
Passes without the word, such as generation, get transformers' SDPA as before.
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
from qlora.runtime.device import on_cuda

NAME = "qlora_documents"

GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""fewer heads in keys and values: later torch wants to be told, torch 2.11 takes them as they are"""


NOTHING_ASKED = (("use_cache", False), ("output_attentions", False), ("is_causal", True))
"""keywords that ask for what is done in any case"""


def asked(keywords: Mapping[str, Any]) -> set[str]:
    """Name the keywords with which transformers asks a layer or its attention for something."""
    return {
        name for name, value in keywords.items() if value is not None and (name, value) not in NOTHING_ASKED
    }


def reads_documents(model: Any) -> bool:
    """Whether the model has, or can be given, attention over documents."""
    attention = model.config._attn_implementation
    if attention != "sdpa":
        return bool(attention == NAME)
    return bool(model._supports_attention_backend) and not getattr(model, "_is_stateful", False)


def read_documents(model: Any) -> None:
    """Give the model our attention, if it can take it. In place."""
    if reads_documents(model):
        model.set_attn_implementation(NAME)


def _no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions is passed on as it is: without one, transformers would read the positions to build one.

    On a GPU that means to wait for it before every forward pass.
    """
    return torch.empty(1, 1, 0, 0, device=device)


def of_whole_rows(length: int, device: torch.device) -> dict[str, Any]:
    """What a forward pass over rows that are one document each is called with besides."""
    positions = torch.arange(length, device=device)[None]
    return {"attention_mask": _no_mask(device), "position_ids": positions, "document_lengths": ()}


def arguments(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a forward pass over documents of these lengths, end to end in one row, is called with besides."""
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
    document_lengths: tuple[int, ...] | None = None,
    document_ends: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, heads, T, d] (fewer heads in key and value) -> [B, T, heads, d], as transformers wants it.

    `document_lengths`: tokens of each document, all together T; B is 1 then. (): every row is one. `document_ends`:
    where each ends, 0 first, int32 on the device. `others`: what else a model says to its attention.

    Raises:
        ModelError: attention over documents cannot do what one of the others asks for.
    """
    if document_lengths is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            sliding_window=sliding_window,
            **others,
        )
    _check_nothing_is_lost(module, others)
    if not document_lengths:
        return _attend_alone(query, key, value, dropout, scaling, sliding_window), None
    if on_cuda(query) and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _attend_all(
            query, key, value, document_ends, max(document_lengths), scaling, sliding_window
        ), None
    parts = (x.split(document_lengths, dim=2) for x in (query, key, value))
    alone = [_attend_alone(q, k, v, dropout, scaling, sliding_window) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(alone, dim=1), None


def _check_nothing_is_lost(module: nn.Module, others: dict[str, Any]) -> None:
    """Raise ModelError where a model asks its attention for something that we would leave out, such as sinks."""
    if lost := asked(others) - {"position_ids"}:  # the lengths say where documents begin
        raise ModelError(
            f"attention over documents does not know {', '.join(sorted(lost))}, which {type(module).__name__} asks for"
        )


def _attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All documents in one kernel: [1, heads, T, d] each -> [1, T, heads, d]."""
    varlen: Any = varlen_attn  # its signature differs from version to version
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))  # [T, heads, d]
    behind = -1 if window is None else window - 1
    attended: Tensor = varlen(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(behind, 0), **GROUPED
    )
    return attended[None]


def _attend_alone(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """One document a row: [B, heads, T, d] each -> [B, T, heads, d]."""
    length, mask = query.shape[2], None
    if window is not None and length > window:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = seen.tril().triu(1 - window)
    return F.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)  # fmt: skip


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
