"""Comparison of our attention over documents with the mask that a model gives its attention.

Our attention knows two masks: a document attends to all its earlier tokens, or to those in a sliding window. A model
whose own mask is another one, such as attention in chunks or in both directions, would be trained on wrong attention in
silence. The masks are compared, not what follows from them, so neither weights nor rounding matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from qlora.model.head import decoder_of, embedding_of
from qlora.model.varlen_attention import attend, visible

NAME = "qlora_compares_masks"

TOKENS, WINDOW = 13, 3
"""tokens of the document on which masks are compared, and the sliding window of all layers that have a larger one"""


@torch.no_grad()
def is_ours(model: PreTrainedModel) -> bool:
    """Return True if every layer that asks for attention gives it the mask that our attention over documents has."""
    equal: list[bool] = []

    def compare(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        equal.append(_equal(query.shape[2], attention_mask, causal, sliding_window))
        return attend(module, query, key, value, attention_mask, *args, is_causal=causal, **others)

    before, training = model.config._attn_implementation, model.training
    AttentionInterface.register(NAME, compare)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=embedding_of(model).weight.device)
    try:
        with _short_windows(model):
            decoder_of(model.eval())(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    return all(equal)


def _equal(length: int, mask: Tensor | None, causal: bool, window: int | None) -> bool:
    """Return True if a mask that broadcasts to [B, heads, T, T], or none, is what our attention computes."""
    ours = visible(length, window, torch.device("cpu"))
    if mask is None:
        theirs = visible(length, None, ours.device) if causal else torch.ones_like(ours)
    elif mask.dtype == torch.bool:
        theirs = mask.cpu()
    else:  # added to the scores: nothing where a token is seen
        theirs = mask.cpu() == 0
    return theirs.shape[-2:] == ours.shape and bool((theirs == ours).all())


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Give all layers a short sliding window within the context, so that a few tokens show who cuts it and who not."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            window = vars(owner).get("sliding_window") if owner is not None else None
            if isinstance(window, int) and window > WINDOW:
                owners[id(owner)] = owner
    before = [(owner, owner.sliding_window) for owner in owners.values()]
    for owner, _ in before:
        owner.sliding_window = WINDOW
    try:
        yield
    finally:
        for owner, window in before:
            owner.sliding_window = window
