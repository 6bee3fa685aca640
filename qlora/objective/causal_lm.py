"""Causal language modelling: the cross-entropy of each supervised token given the earlier tokens of its document."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from qlora.data import IGNORE_INDEX, Batch
from qlora.model import document_bounds, varlen_attention
from qlora.model.head import decoder_of, embedding_of, head_of
from qlora.model.packed_masks import packed_arguments
from qlora.model.router_loss import logits_not_captured, router_loss_of, set_padding
from qlora.objective.objective import Loss, Objective
from qlora.ops.cross_entropy import linear_cross_entropy
from qlora.ops.dropout import set_row_positions
from qlora.runtime.device import token_multiple
from qlora.runtime.phases import Phase, announce


@dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token prediction; the mean loss is in nats per supervised token.

    The auxiliary loss is the load-balancing loss of a mixture's routers (`model.router_loss`). Training adds it; an
    evaluation does not, so held-out losses are the cross-entropy alone.
    """

    loss_chunk: int | None = None
    """supervised tokens that pass through the head at a time; None means as many as `tokens_at_once` returns"""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the summed loss of the batch, see `loss_sum`, and in training the loss of its routers."""
        balance = router_loss_of(model) if model.training else None
        if balance is None:
            return Loss(loss_sum(model, batch, loss_chunk=self.loss_chunk))
        with balance.collected() as routed:
            total = loss_sum(model, batch, loss_chunk=self.loss_chunk)
        with announce(Phase.LOSS):
            return Loss(total, aux=routed.loss())

    def weight(self, batch: Batch) -> int:
        """Return the number of supervised tokens in the batch."""
        return batch.supervised

    def aux_coefficient(self, model: nn.Module) -> float:
        """Return the coefficient of the load-balancing loss."""
        balance = router_loss_of(model)
        return 0.0 if balance is None else balance.coefficient


def hidden_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the decoder's last hidden states [B, T, H] and the token to predict at each position [B, T].

    A model with attention over documents gets them concatenated in one row, B = 1, unless the rows have no padding. On
    some devices an extra document pads this row to a multiple (`token_multiple`).

    A model with `document_bounds` gets the documents of a batch in the same way. Other models get no attention mask.
    Padding is on the right, where a causal model does not attend, and position ids that restart at 0 make transformers
    separate the documents of a packed row.
    """
    device = next(model.parameters()).device
    embedding = embedding_of(model)
    more: dict[str, object] = {}
    lengths = batch.row_lengths
    starts: Sequence[int] = range(0, batch.input_ids.numel(), batch.input_ids.shape[1])
    if model.config._attn_implementation == varlen_attention.NAME:  # type: ignore[union-attr]
        multiple = token_multiple(device, embedding.weight.dtype)
        if batch.plain and batch.input_ids.numel() % multiple == 0:
            more = varlen_attention.whole_row_arguments(batch.input_ids.shape[1], device)
        else:
            batch, documents = batch.end_to_end(multiple)
            more = varlen_attention.arguments(documents, device)
            starts = [0, *itertools.accumulate(lengths[:-1])]
    elif batch.documents is not None and document_bounds.bounds_passed(model):
        batch, documents = batch.end_to_end()
        more = document_bounds.arguments(documents, device)
        starts = [0, *itertools.accumulate(lengths[:-1])]
    elif batch.position_ids is not None:
        positions = batch.position_ids.to(device, non_blocking=True)
        more = packed_arguments(model, embedding.weight, positions)
    set_row_positions(starts, lengths, batch.input_ids.numel())
    set_padding(starts, lengths, batch.input_ids.numel(), device)
    ids = batch.input_ids.to(embedding.weight.device, non_blocking=True)
    with logits_not_captured(model):
        hidden = decoder_of(model)(input_ids=ids, use_cache=False, **more).last_hidden_state
    labels = batch.labels.to(device, non_blocking=True)
    return hidden, F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the hidden states [N, H] that predict the batch's N supervised tokens, and these tokens [N]."""
    hidden, targets = (tensor.flatten(0, 1) for tensor in hidden_states(model, batch))
    supervised = targets != IGNORE_INDEX
    return hidden[supervised], targets[supervised]


def loss_sum(model: nn.Module, batch: Batch, *, loss_chunk: int | None = None) -> Tensor:
    """Return the summed cross-entropy (nats, fp32 scalar) of the batch's supervised tokens.

    Only hidden states that predict supervised tokens pass through the head, `loss_chunk` at a time (None: as many as
    `tokens_at_once` returns).
    """
    hidden, targets = hidden_states(model, batch)
    head = head_of(model)
    with announce(Phase.LOSS):
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            chunk=loss_chunk,
            supervised=batch.supervised,  # known on the host, so the GPU is not synchronized
            rows=head.rows,
        )
