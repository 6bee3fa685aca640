"""Proof on a few tokens, before a run, that this model can be trained as we do it."""

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
    """Prove that the model can be trained by this recipe, and give it attention over documents if it takes it."""
    check_vocabulary(model, tokenizer, recipe.base.model)
    check_head(model)
    proved = read_documents_if_apart(model)
    if recipe.data.packing and not proved:
        check_packing(model)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove on eight tokens that our loss is the loss of the model's own logits.

    Guards against architectures that do something to their logits that `head_of` does not know.
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
                f"base.embedding: {type(model).__name__} needs the token ids on the GPU too, so leave the key out "
                f"({str(error).splitlines()[0]})"
            ) from error
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), use_cache=False).logits.float()  # [1, 8, V]
        theirs = F.cross_entropy(logits[0, :-1], ids[0, 1:].to(device), reduction="sum").item()
    if abs(ours - theirs) > 0.02 * abs(theirs) + 0.02:
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way qlora does not know "
            f"(loss {ours:.4f}, by its own forward {theirs:.4f}). Please report the architecture."
        )


def check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raise ModelError if the tokenizer of the base `name` has tokens that its embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ModelError(
            f"base.model: the tokenizer of {name!r} has {len(tokenizer)} tokens, its embedding only {rows} rows. "
            "The tokenizer belongs to another model"
        )


def read_documents_if_apart(model: PreTrainedModel) -> bool:
    """Give the model attention over documents end to end, if it can take it and is seen to keep them apart.

    Returns whether it has it.
    """
    before = model.config._attn_implementation
    varlen_attention.read_documents(model)
    try:
        apart = _kept_apart(model)[0]
    except torch.OutOfMemoryError:
        raise
    except (ModelError, RuntimeError):
        apart = False  # its attention wants more than ours gives: sinks, or a mask in any case
    if not apart:
        model.set_attn_implementation(before)
    return apart and model.config._attn_implementation == varlen_attention.NAME


def check_packing(model: nn.Module) -> None:
    """Prove that documents which share a row do not see each other.

    Architectures that do not build their attention mask from the position ids would leak in silence.
    """
    passed, together, apart = _kept_apart(model)
    if not passed:
        raise RecipeError(
            f"{type(model).__name__} lets documents that are packed into one row see each other "
            f"(loss {together:.4f}, apart {apart:.4f}): set data.packing=false"
        )


@torch.no_grad()
def _kept_apart(model: nn.Module) -> tuple[bool, float, float]:
    """Whether two documents of eight tokens cost in one row what they cost in two, and both losses."""
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
