"""Answers: greedy decoding of a prompt by a base with its adapter."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora.step import evaluation_mode


@torch.no_grad()
def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], max_new_tokens: int = 64
) -> str:
    """The model's greedy continuation of `prompt` (token ids), as text without special tokens.

    Deterministic: the same model and prompt give the same answer.

    >>> answer(model, tokenizer, tokenizer("Once upon a time").input_ids, max_new_tokens=32)
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)  # [1, T]
    with evaluation_mode(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
