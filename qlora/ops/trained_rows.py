"""Trained rows of a frozen embedding or output head: dW of these rows alone, as PEFT's trainable tokens.

A row here replaces that of the frozen weight; it is no update to add. Rows behind the frozen weight's last extend the
vocabulary. Their gradients equal those rows of the gradient of the whole weight, summed in at least fp32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Rows(NamedTuple):
    """Rows of a weight [V, H] that replace its own, or extend it."""

    ids: Tensor
    """[n] int64, distinct: numbers of the rows"""
    values: Tensor
    """[n, H]"""
    size: int
    """rows of the whole weight: V, or more if it is extended"""

    def columns(self, hidden: Tensor) -> Tensor:
        """Return the products [..., n] of hidden [..., H] with the rows, in the dtype of `hidden`."""
        return hidden @ self.values.to(hidden.dtype).T


def replace_rows(embedded: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Replace the embedded tokens that have a trained row.

    Args:
        embedded: frozen rows of the tokens [..., H].
        values: trained rows [n, H].
        positions: number of each token's trained row [...] int64; n for a token without one.

    Returns:
        [..., H] in the dtype of `embedded`.
    """
    replaced: Tensor = _ReplaceRows.apply(embedded, values, positions)
    return replaced


class _ReplaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.values = values.shape, values.dtype
        rows = values.to(embedded.dtype).index_select(0, positions.flatten().clamp(max=len(values) - 1))
        trained = (positions < len(values)).unsqueeze(-1)
        return torch.where(trained, rows.view(embedded.shape), embedded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (positions,) = ctx.saved_tensors
        (count, width), dtype = ctx.values
        wide = torch.promote_types(grad.dtype, torch.float32)
        d_values = None
        if ctx.needs_input_grad[1]:
            # one row more than there are, for the tokens without a trained row
            sums = torch.zeros(count + 1, width, dtype=wide, device=grad.device)
            d_values = sums.index_add_(0, positions.flatten(), grad.flatten(0, -2).to(wide))[:-1].to(dtype)
        d_embedded = None
        if ctx.needs_input_grad[0]:
            d_embedded = grad.masked_fill((positions < count).unsqueeze(-1), 0)
        return d_embedded, d_values, None


def replace_columns(logits: Tensor, hidden: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """Replace the logits [..., V] that the frozen weight gives the trained rows; returns [..., rows.size].

    Args:
        logits: products of `hidden` with the frozen weight.
        hidden: [..., H].
        rows: the trained rows.
        bias: [V], which the logits contain; a row that extends the weight has none.
    """
    added = rows.size - logits.shape[-1]
    columns = rows.columns(hidden)
    if bias is not None:
        columns = columns + F.pad(bias, (0, added)).index_select(0, rows.ids)
    return F.pad(logits, (0, added)).index_copy(-1, rows.ids, columns.to(logits.dtype))
