"""Checks before a run, on a few tokens, that qlora's loss is correct for this model; see `apart` for documents."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora.adapter.trained_rows import TrainedRows
from qlora.data import Batch
from qlora.errors import ModelError, RecipeError, first_line
from qlora.model.finite import not_finite
from qlora.model.head import embedding_of, head_of
from qlora.model.offload import HostEmbedding
from qlora.model.router_loss import router_loss_of, set_padding
from qlora.objective.apart import check_packing, read_documents_if_apart
from qlora.objective.causal_lm import loss_sum
from qlora.objective.causality import check_causal
from qlora.objective.step import evaluation_mode
from qlora.recipe import Recipe

ENLARGED = 128
"""factor of the output head in its check; an untrained model then has logits of about 20"""
HEAD_TOLERANCE, HEAD_TOLERANCE_16_BITS = 3e-3, 1e-2
"""largest relative difference of the losses; GPUs can multiply float32 with ten bits of mantissa"""
ROUTER_TOLERANCE = 1e-4
"""largest relative difference of two sums in fp32 over the same logits of the routers"""


def check_model(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> None:
    """Check that the recipe can train the model, and switch to attention over documents if the model supports it.

    Raises:
        ModelError: the tokenizer, the output head or the load-balancing loss does not fit, or the model is not causal.
        RecipeError: the model does not support packing or the embedding on the host.
    """
    check_vocabulary(model, tokenizer, recipe.base.model)
    check_head(model)
    check_router_loss(model)
    check_causal(model, recipe.base.model)
    read_documents(model, recipe)


def read_documents(model: PreTrainedModel, recipe: Recipe) -> None:
    """Let the model read the rows of the recipe: attention over documents if it supports it, else documents kept apart.

    Raises:
        RecipeError: rows are packed, and the documents in a row would influence each other.
    """
    longest = recipe.data.max_length
    if not read_documents_if_apart(model, longest) and recipe.data.packing:
        check_packing(model, longest)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Check on eight tokens that our loss equals the loss of the model's own logits.

    This detects architectures that change their logits in a way that `head_of` does not support. The head's weights are
    scaled up for it, because small logits, as of an untrained model, hide a factor or a cap.

    Raises:
        ModelError: the losses differ, or a weight is not finite.
        RecipeError: the model needs the token ids on the GPU, but its embedding is in host memory.
    """
    vocabulary = head_of(model).weight.shape[0]
    ids = torch.arange(8)[None] * 7 % vocabulary  # [1, 8]
    batch = Batch(input_ids=ids, labels=ids.clone(), position_ids=None, tokens=8, supervised=7)
    with evaluation_mode(model), _head_enlarged(model):
        try:
            ours = loss_sum(model, batch).item()
        except RuntimeError as error:
            if not isinstance(embedding_of(model), HostEmbedding):
                raise
            raise RecipeError(
                f"base.embedding: {type(model).__name__} needs the token ids on the GPU, so remove this key "
                f"({first_line(error)})"
            ) from error
        device = next(model.parameters()).device
        output = model(input_ids=ids.to(device), use_cache=False).logits  # [1, 8, V]
        theirs = F.cross_entropy(output[0, :-1].float(), ids[0, 1:].to(device), reduction="sum").item()
    if not (isfinite(ours) and isfinite(theirs)) and (weight := not_finite(model)) is not None:
        raise ModelError(
            f"base.model: {weight} of this {type(model).__name__} has a value that is not finite (NaN or an infinity), "
            "so its loss has none. The checkpoint is damaged: restore it from a copy"
        )
    tolerance = HEAD_TOLERANCE if output.itemsize >= 4 else HEAD_TOLERANCE_16_BITS
    if not abs(ours - theirs) <= tolerance * abs(theirs):
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way that qlora does not support (with the output head "
            f"times {ENLARGED}: loss {ours:.4f}, with the model's own forward pass {theirs:.4f}). Please report the "
            "architecture"
        )


@torch.no_grad()
def check_router_loss(model: nn.Module) -> None:
    """Check on two rows, one of them padded, that our load-balancing loss of the routers equals the model's own.

    Both are computed in one pass, so that a router that is undecided between two experts cannot part them.

    Raises:
        ModelError: the losses differ.
    """
    balance = router_loss_of(model)
    if balance is None:
        return
    device = next(model.parameters()).device
    lengths = (8, 5)
    ids = torch.arange(16).view(2, 8) * 7 % head_of(model).vocabulary
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]  # [2, 8]
    with evaluation_mode(model), balance.collected() as routed:
        set_padding((0, 8), lengths, 16, device)
        output = model(
            input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False,
            output_router_logits=True,
        )  # fmt: skip
        ours, theirs = float(routed.loss()), float(output.aux_loss)
    if not abs(ours - theirs) <= ROUTER_TOLERANCE * abs(theirs):
        raise ModelError(
            f"{type(model).__name__} computes its load-balancing loss in a way that qlora does not support "
            f"({ours:.4f}, with the model's own forward pass {theirs:.4f}). Please report the architecture; "
            "training.router_loss=off trains without this loss"
        )


@contextmanager
def _head_enlarged(model: nn.Module) -> Iterator[None]:
    """Multiply the output head by a power of two within the context, which changes and restores exactly."""
    head = head_of(model)
    weights = [head.weight] if head.rows is None else [head.weight, head.rows.values]
    for weight in weights:
        weight.mul_(ENLARGED)
    try:
        yield
    finally:
        for weight in weights:
            weight.div_(ENLARGED)


def check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raise ModelError if the tokenizer has more tokens than the embedding of the base `name` has rows."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.size if isinstance(embedding, TrainedRows) else embedding.weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"base.model: the tokenizer of {name!r} has {len(tokenizer)} tokens, but the embedding only {rows} rows. "
            "The tokenizer belongs to another model: use this model's own. If its last tokens are new, train their "
            "rows with adapter.train_tokens=new"
        )
