"""Checks before a run, on a few tokens, that qlora's loss and packing are correct for this model."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora.data import IGNORE_INDEX, Batch
from qlora.errors import ModelError, RecipeError
from qlora.model import varlen_attention
from qlora.model.head import head_of
from qlora.model.offload import HostEmbedding
from qlora.objective.causal_lm import loss_sum
from qlora.objective.step import evaluation_mode
from qlora.recipe import Recipe


def check_model(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> None:
    """Check that the recipe can train the model, and switch to attention over documents if the model supports it.

    Raises:
        ModelError: the tokenizer or the output head does not fit.
        RecipeError: the model does not support packing or the embedding on the host.
    """
    check_vocabulary(model, tokenizer, recipe.base.model)
    check_head(model)
    proved = read_documents_if_apart(model)
    if recipe.data.packing and not proved:
        check_packing(model)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Check on eight tokens that our loss equals the loss of the model's own logits.

    This detects architectures that change their logits in a way that `head_of` does not support.

    Raises:
        ModelError: the losses differ.
        RecipeError: the model needs the token ids on the GPU, but its embedding is in host memory.
    """
    vocabulary = head_of(model).weight.shape[0]
    ids = torch.arange(8)[None] * 7 % vocabulary  # [1, 8]
    batch = Batch(input_ids=ids, labels=ids.clone(), position_ids=None, tokens=8, supervised=7)
    with evaluation_mode(model):
        try:
            ours = loss_sum(model, batch).item()
        except RuntimeError as error:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
            if not isinstance(embedding, HostEmbedding):
                raise
            raise RecipeError(
                f"base.embedding: {type(model).__name__} needs the token ids on the GPU, so remove this key "
                f"({str(error).splitlines()[0]})"
            ) from error
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), use_cache=False).logits.float()  # [1, 8, V]
        theirs = F.cross_entropy(logits[0, :-1], ids[0, 1:].to(device), reduction="sum").item()
    if abs(ours - theirs) > 0.02 * abs(theirs) + 0.02:
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way that qlora does not support "
            f"(loss {ours:.4f}, with the model's own forward pass {theirs:.4f}). Please report the architecture."
        )


def check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raise ModelError if the tokenizer has more tokens than the embedding of the base `name` has rows."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ModelError(
            f"base.model: the tokenizer of {name!r} has {len(tokenizer)} tokens, but the embedding only {rows} rows. "
            "The tokenizer belongs to another model; use this model's own tokenizer"
        )


def read_documents_if_apart(model: PreTrainedModel) -> bool:
    """Switch the model to attention over documents, if a check shows that it keeps the documents apart.

    Returns:
        True if the model now has attention over documents.
    """
    before = model.config._attn_implementation
    varlen_attention.read_documents(model)
    try:
        apart = _kept_apart(model)[0]
    except torch.OutOfMemoryError:
        raise
    except (ModelError, RuntimeError):
        apart = False  # its attention needs something that ours does not support, such as sinks or a mask
    if not apart:
        model.set_attn_implementation(before)
    return apart and model.config._attn_implementation == varlen_attention.NAME


def check_packing(model: nn.Module) -> None:
    """Check that documents in one row do not attend to each other.

    Architectures that do not build their attention mask from the position ids would mix documents in silence.

    Raises:
        RecipeError: the documents attend to each other.
    """
    passed, together, apart = _kept_apart(model)
    if not passed:
        raise RecipeError(
            f"{type(model).__name__} lets documents that are packed into one row attend to each other "
            f"(loss {together:.4f}, in separate rows {apart:.4f}): set data.packing=false"
        )


@torch.no_grad()
def _kept_apart(model: nn.Module) -> tuple[bool, float, float]:
    """Return True if two documents of eight tokens have the same loss in one row as in two, and both losses."""
    vocabulary = head_of(model).weight.shape[0]
    ids = (torch.arange(16) * 11 + 3) % vocabulary
    labels = ids.clone()
    labels[[0, 8]] = IGNORE_INDEX
    positions = torch.arange(8).repeat(2)[None]  # [1, 16]
    packed = Batch(ids[None], labels[None], positions, tokens=16, supervised=14, documents=((8, 8),))
    alone = Batch(ids.view(2, 8), labels.view(2, 8), None, tokens=16, supervised=14)
    with evaluation_mode(model):
        together, apart = loss_sum(model, packed).item(), loss_sum(model, alone).item()
    return abs(together - apart) <= 0.005 * abs(apart) + 0.01, together, apart
