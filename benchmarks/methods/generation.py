"""Greedy answers to many prompts at once."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from qlora.objective.step import evaluation_mode

Cache = Any
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""keyword of a model's cache; transformers 5.24 renamed it"""


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    filled: Callable[[int], Cache] | None = None,
) -> list[list[int]]:
    """Return the most likely tokens after each prompt, without the stop token.

    Args:
        model: a causal language model of transformers, adapted or not.
        prompts: token ids.
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer in tokens.
        filled: makes the cache that precedes the prompts, for a number of rows; None means an empty one.
    """
    cache = DynamicCache() if filled is None else filled(len(prompts))
    before = cache.get_seq_length()
    ids, mask = left_padded(prompts)
    mask = torch.cat([mask.new_ones(len(prompts), before), mask], 1)
    stops = torch.tensor(sorted(stop_ids))
    answers: list[list[int]] = [[] for _ in prompts]
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
                **{CACHE: cache},
            )  # fmt: skip
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            ended |= torch.isin(ids[:, 0], stops)
            if ended.all():
                break
            for answer, token, over in zip(answers, ids[:, 0].tolist(), ended.tolist(), strict=True):
                if not over:
                    answer.append(token)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    return answers


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask [B, T] with the prompts at the right end."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask
