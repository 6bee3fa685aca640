"""Causal attention with capped scores, softcap * tanh(score / softcap), as in Gemma 2 (Gemma Team 2024).

Torch's fused attention knows no cap. Here a few queries at a time see the keys that they attend to; the backward
computes their scores again. So memory for scores is that of one chunk of queries, in every layer and document.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SCORES = 2**20
"""scores of a head at a time: 512 queries with 2,048 keys"""


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    *,
    scaling: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend with capped scores: [B, heads, T, d] and two [B, key heads, S, d] -> [B, T, heads, d].

    Args:
        query: queries of the last T of S tokens; heads is a multiple of the key heads.
        key: keys of all S tokens.
        value: values of all S tokens.
        softcap: bound of the scores.
        scaling: factor of the scores before the cap; None means 1/sqrt(d).
        window: number of tokens that a token attends to, including itself; None means all. Not used with a mask.
        mask: [B or 1, 1, T, S], bool, True where a query sees a key, or a float that is added to the scores; None means
            that a query sees all earlier tokens.
        dropout: dropout of the attention weights.
    """
    attend = partial(
        _attend,
        softcap=softcap,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    parts = []
    chunk = max(1, SCORES // key.shape[2])
    for start in range(0, query.shape[2], chunk):
        queries = query[:, :, start : start + chunk]
        if mask is None:
            first, seen = _seen(start, queries.shape[2], query.shape[2], key.shape[2], window, query.device)
        else:
            first, seen = 0, mask[:, :, start : start + chunk]
        columns = slice(first, first + seen.shape[-1])
        arguments = queries, key[:, :, columns], value[:, :, columns], seen
        parts.append(
            checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
            if torch.is_grad_enabled()
            else attend(*arguments)
        )
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _seen(
    start: int, count: int, length: int, keys: int, window: int | None, device: torch.device
) -> tuple[int, Tensor]:
    """Return the first key that `count` queries from number `start` see, and their mask [1, 1, count, keys]."""
    earlier = keys - length
    last = earlier + start + count
    first = 0 if window is None else max(0, earlier + start + 1 - window)
    rows = torch.arange(last - count, last, device=device)[:, None]
    columns = torch.arange(first, last, device=device)
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    return first, seen[None, None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, softcap: float, scaling: float, dropout: float
) -> Tensor:
    """Attend in one chunk of queries [B, heads, t, d]; return [B, heads, t, d]."""
    groups = query.shape[1] // key.shape[1]
    rows = query.unflatten(1, (-1, groups)).flatten(2, 3)  # queries of the heads that share a key
    scores = (rows @ key.transpose(2, 3)).mul_(scaling / softcap).tanh_() * softcap
    scores = _masked(scores.unflatten(2, (groups, -1)), seen[:, :, None])
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    attended = F.dropout(weights, dropout).flatten(2, 3) @ value
    return attended.unflatten(2, (groups, -1)).flatten(1, 2)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask, bool or added, that broadcasts to the scores."""
    return (
        scores + mask
        if mask.is_floating_point()
        else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    )
