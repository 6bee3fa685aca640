"""Check that documents in one row do not influence each other, on documents of a few tokens.

A leak between documents changes what is learned in silence, and a loss hardly shows it. So the check compares hidden
states, and of the same document: b follows document a in one row and document c in another. Both rows have the same
shape, so nothing but a leak changes the hidden states of b: without a leak they are equal to the last bit, in every
dtype, and no tolerance for rounding hides a small leak. An untrained model, whose attention is uniform, shows it as
well as a trained one, and the weights need not be scaled.

Two exceptions: the experts of a mixture multiply as many rows as the router sends, so their rounding depends on the
other document; it is measured where no leak is possible, with b in front. And b alone must equal b behind a, which it
does not if the positions continue across documents; here the place in the row changes, and so does the rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.data import Batch
from qlora.errors import QloraError, RecipeError, first_line
from qlora.model import own_mask, varlen_attention
from qlora.model.document_bounds import keeps_state, pass_bounds
from qlora.model.head import head_of
from qlora.objective.causal_lm import hidden_states
from qlora.objective.step import evaluation_mode
from qlora.runtime.out_of_memory import is_out_of_memory

LONG, SHORT = 11, 7
"""tokens of the documents a and c, and of b; odd, so that no block or window of a model ends where a document does"""

LEAK, ROUNDINGS = 1e-5, 10.0
"""largest relative difference of b behind a and behind c, and the multiple of the measured rounding that is added"""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences by the dtype of the hidden states."""

    rounding: float
    """of b in front of a and of c, for a mixture of experts; any other model gives equal bits"""
    moved: float
    """of b behind a and in front of it; positions that continue change a hidden state as much as other tokens do"""


IN_32_BITS, IN_16_BITS = Tolerance(rounding=1e-4, moved=1e-3), Tolerance(rounding=0.05, moved=0.2)

TRIES = 3
"""sets of tokens: a router that is undecided between two experts can change one result, but hardly three"""


@dataclass(frozen=True)
class Influence:
    """Influence of a document on the next one in its row: relative differences of hidden states."""

    leak: float
    """largest difference of a document's hidden states behind two different documents"""
    rounding: float
    """the same for a document in front of two different documents, which it must not see either"""
    moved: float
    """largest difference behind another document and in front of it"""
    tolerance: Tolerance
    experts: bool
    """True if the model is a mixture of experts"""

    @property
    def leaks(self) -> bool:
        """True if a document changes another one; also if a hidden state is not finite."""
        if not self.experts:
            return not (self.leak <= LEAK and self.rounding <= LEAK)
        allowed = LEAK + ROUNDINGS * self.rounding
        return not (self.leak <= allowed and self.rounding <= self.tolerance.rounding)

    @property
    def none(self) -> bool:
        """True if the documents are kept apart."""
        return not self.leaks and self.moved <= self.tolerance.moved

    @property
    def size(self) -> str:
        """The largest change of a hidden state, for a message."""
        return f"a hidden state changes by {max(self.leak, self.rounding, self.moved):.2g} of its size"


def read_documents_if_apart(model: PreTrainedModel, longest: int | None = None) -> bool:
    """Switch the model to attention over documents, if checks show that it is the model's own and keeps them apart.

    Rows that are laid end to end without packing depend on these checks too.

    Args:
        model: the model, which is changed in place.
        longest: tokens of the longest document; None means any number.

    Returns:
        True if the model now has attention over documents.
    """
    before = model.config._attn_implementation
    varlen_attention.read_documents(model, longest)
    if model.config._attn_implementation != varlen_attention.NAME:
        return False
    try:
        apart = not keeps_state(model) and own_mask.is_ours(model) and influence(model).none
    except Exception as error:  # the model's code can fail in any way
        if is_out_of_memory(error):
            raise
        apart = False  # its attention needs something that ours does not support, such as sinks or a mask
    if not apart:
        model.set_attn_implementation(before)
    return apart


def check_packing(model: Any, longest: int | None = None) -> None:
    """Check that documents in one row do not influence each other; pass their bounds to a model that needs them.

    Models leak that build their attention mask without position ids, and models whose layers keep a state or convolve
    over neighbouring tokens. Layers that attend in chunks count these from the start of the row, not of the document.

    Args:
        model: the model.
        longest: tokens of the longest row; None means any number.

    Raises:
        RecipeError: the documents influence each other.
    """
    kind, advice = type(model).__name__, "Set data.packing=false"
    if (chunk := varlen_attention.chunk_below(model.config, longest)) is not None:
        raise RecipeError(
            f"data.packing: {kind} attends in chunks of {chunk:,} tokens (attention_chunk_size in its config.json), "
            f"which begin at the start of a row and not of each document in it. {advice}, or data.max_length={chunk}"
        )
    if not keeps_state(model):
        try:
            found = influence(model)
        except Exception as error:  # the model's code can fail in any way
            if is_out_of_memory(error) or isinstance(error, QloraError):
                raise
            raise RecipeError(
                f"data.packing: {kind} fails on a row of two documents ({type(error).__name__}: {first_line(error)}). "
                f"{advice}"
            ) from error
        if not found.none:
            how = "see each other" if found.leaks else "change their positions"
            raise RecipeError(
                f"data.packing: documents that {kind} gets in one row {how} ({found.size}). {advice}"
            )
        return
    pass_bounds(model, True)
    try:
        found = influence(model)
    except (RuntimeError, ValueError, TypeError) as error:  # transformers names the package that is missing
        if is_out_of_memory(error):
            raise
        pass_bounds(model, False)
        raise RecipeError(
            f"data.packing: {kind} keeps a state across the documents of a row: {first_line(error)}. {advice}"
        ) from error
    if not found.none:
        pass_bounds(model, False)
        raise RecipeError(
            f"data.packing: {kind} keeps a state across the documents of a row, and transformers does not reset it "
            f"({found.size}). {advice}"
        )


@torch.no_grad()
def influence(model: nn.Module) -> Influence:
    """Measure the influence of a document on the next one in its row, with the smallest of up to three results."""
    vocabulary = head_of(model).weight.shape[0]
    best: Influence | None = None
    for seed in range(TRIES):
        ids = torch.randint(vocabulary, (2 * LONG + SHORT,), generator=torch.Generator().manual_seed(seed))
        a, b, c = ids.split((LONG, SHORT, LONG))
        found = _influence(model, a, b, c)
        if best is None or found.leak + found.moved < best.leak + best.moved:
            best = found
        if best.none:
            break
    assert best is not None
    return best


def _influence(model: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> Influence:
    """Compare the hidden states of document b in the rows ab, cb, ba and bc."""
    with evaluation_mode(model):
        behind_a, behind_c = states(model, a, b)[len(a) :], states(model, c, b)[len(c) :]
        before_a = states(model, b, a)[: len(b)]
        before_c = states(model, b, c)[: len(b)]
    tolerance = IN_32_BITS if before_a.itemsize >= 4 else IN_16_BITS
    return Influence(
        leak=difference(behind_a, behind_c),
        rounding=difference(before_a, before_c),
        moved=difference(behind_a, before_a),
        tolerance=tolerance,
        experts=has_experts(model),
    )


def has_experts(model: nn.Module) -> bool:
    """Return True if the model is a mixture of experts, whose routers can turn a rounding into another choice."""
    return any("experts" in name for name, _ in model.named_modules())


def states(model: nn.Module, *documents: Tensor) -> Tensor:
    """Return the hidden states [T, H] of documents in one row."""
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    lengths = tuple(map(len, documents))
    batch = Batch(
        ids, ids.clone(), positions, tokens=ids.numel(), supervised=ids.numel() - 1, documents=(lengths,)
    )
    return hidden_states(model, batch)[0][0, : ids.numel()]


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of a token's hidden states [T, H], relative to their size."""
    one, other = one.float(), other.float()
    size = other.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((one - other).norm(dim=-1) / size).max().item()
