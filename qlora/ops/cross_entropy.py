"""The output head fused with its loss: the logits [tokens, vocabulary] are never in memory as a whole.

For a 128K vocabulary the logits are the largest tensor of a training step. Here the trained tokens pass through the
head `chunk` at a time. The forward also computes the gradient of each chunk, as Liger does (Hsu et al. 2024), because
all its inputs are then available. With a frozen head this takes two products, and nothing is recomputed. Trained rows
of a frozen head get exact gradients without a gradient of the whole head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.data.batches import IGNORE_INDEX
from qlora.kernels import loss_and_gradient
from qlora.ops.trained_rows import Rows
from qlora.quantization.nf4 import autocast
from qlora.runtime.device import on_cuda

LARGEST_CHUNK, LOGITS_BYTES = 1024, 2**28


def tokens_at_once(vocabulary: int) -> int:
    """Return the default number of trained tokens that pass through the head at a time.

    1,024 tokens are enough to use a whole GPU. For a large vocabulary the number is smaller, a multiple of 128, so that
    the fp32 logits take at most 256 MiB. Larger blocks fragment memory: with 512 instead of 1,024 tokens, 0.2 GiB less
    is reserved for an 8B model (`benchmarks/speed/LOG.md`).
    """
    fitting = LOGITS_BYTES // (4 * vocabulary) // 128 * 128
    return min(LARGEST_CHUNK, max(128, fitting))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
    supervised: int | None = None,
    rows: Rows | None = None,
) -> Tensor:
    """Compute the sum (not the mean) of the cross-entropies of all tokens whose label is not IGNORE_INDEX.

    The logits are `logit_scale * (hidden W^T + bias)`, then `softcap * tanh(logits / softcap)` if `softcap` is given.
    `hidden`, `weight`, `bias` and `rows` get gradients if they require them, summed in fp32.

    Args:
        hidden: final hidden states [N, H].
        weight: head [V, H].
        labels: token ids [N], already shifted by the caller. Ignored tokens never pass through the head.
        bias: [V].
        softcap: bound of the logits (Gemma 2).
        logit_scale: factor of the logits.
        chunk: tokens that pass through the head at a time; None uses `tokens_at_once`.
        supervised: number of labels that are not ignored. It avoids a device synchronisation, and is required under
            FakeTensorMode.
        rows: trained rows that replace those of `weight` or extend it; the others are then frozen, and a row that
            extends it has no bias.

    Returns:
        An fp32 scalar in nats.
    """
    trained = labels != IGNORE_INDEX
    count = int(trained.sum()) if supervised is None else supervised
    index = torch.nonzero_static(trained, size=count).squeeze(1)
    grad = torch.is_grad_enabled()  # read here: always False inside the function
    loss: Tensor = _LinearCrossEntropy.apply(
        autocast(hidden),
        weight,
        bias,
        None if rows is None else rows.values,
        labels,
        index,
        softcap,
        logit_scale,
        chunk or tokens_at_once(len(weight)),
        rows,
        grad,
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        labels: Tensor,
        index: Tensor,
        softcap: float | None,
        logit_scale: float,
        chunk: int,
        rows: Rows | None,
        grad: bool,
    ) -> Tensor:
        wants = [grad and needed for needed in ctx.needs_input_grad[:4]]
        assert rows is None or not wants[1], "with trained rows the other rows of the head are frozen"
        head = weight.to(hidden.dtype)
        wide = _at_least_fp32(hidden)
        d_hidden = torch.zeros_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=_at_least_fp32(weight)) if wants[1] else None
        d_values = torch.zeros_like(values, dtype=wide) if values is not None and wants[3] else None
        d_bias = None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        # One buffer for the logits of all chunks, and one for their gradients if these have fewer bits
        rows_at_once = min(chunk, len(index))
        scratch = hidden.new_empty(rows_at_once, len(head) if rows is None else rows.size, dtype=wide)
        slopes = None
        if any(wants):
            slopes = scratch if hidden.dtype == wide else torch.empty_like(scratch, dtype=hidden.dtype)
        for part in index.split(chunk):
            states, targets = hidden.index_select(0, part), labels.index_select(0, part)
            logits = scratch[: len(part)]
            _logits(states, head, logits[:, : len(head)])
            if rows is not None:
                logits.index_copy_(1, rows.ids, _columns(states, rows, wide))
            if bias is not None:
                logits[:, : len(bias)] += bias
            gradient = None if slopes is None else slopes[: len(part)]
            loss += loss_and_gradient(logits, targets, softcap, logit_scale, gradient).sum()
            if gradient is None:
                continue
            if wants[2]:
                summed = gradient[:, : len(head)].sum(0, dtype=wide)
                d_bias = summed + (0 if d_bias is None else d_bias)
            columns = None if rows is None else gradient.index_select(1, rows.ids)
            if d_hidden is not None:
                d_hidden.index_copy_(0, part, _state_gradient(gradient, head, rows, columns))
            if d_weight is not None:
                d_weight += gradient.T @ states
            if d_values is not None and columns is not None:
                d_values.addmm_(columns.T.to(wide), states.to(wide))
        ctx.save_for_backward(d_hidden, d_weight, d_bias, d_values)
        ctx.dtypes = [None if given is None else given.dtype for given in (hidden, weight, bias, values)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None, None


def _columns(states: Tensor, rows: Rows, wide: torch.dtype) -> Tensor:
    """Return the logits [n, rows] of the trained rows, with sums that are not rounded to 16 bits."""
    return rows._replace(values=rows.values.detach().to(states.dtype)).columns(states.to(wide))


def _state_gradient(gradient: Tensor, head: Tensor, rows: Rows | None, columns: Tensor | None) -> Tensor:
    """Return the gradient of the hidden states; overwrites `gradient` at the trained rows, which have their own."""
    if rows is None or columns is None:
        return gradient @ head
    gradient.index_fill_(1, rows.ids, 0)
    return (gradient[:, : len(head)] @ head).addmm_(columns, rows.values.detach().to(head.dtype))


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(rows: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """Multiply rows [n, H] by head^T into `out` [n, V], which is at least fp32."""
    if rows.dtype == out.dtype:
        return torch.mm(rows, head.T, out=out)
    if on_cuda(rows):  # tensor cores sum in fp32: keep the sums instead of rounding them to 16 bits
        if out.is_contiguous():
            return torch.mm(rows, head.T, out_dtype=out.dtype, out=out)
        return out.copy_(torch.mm(rows, head.T, out_dtype=out.dtype))
    return out.copy_(rows @ head.T)
