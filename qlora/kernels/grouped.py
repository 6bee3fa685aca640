"""Products of rows with a matrix of their group, such as the tokens of an expert with the expert's weights.

Rows are sorted by group. In plain torch each group is a product of its own; a Triton kernel takes all groups at once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


class Spans(NamedTuple):
    """Rows of each group: group g has the rows from `ends[g - 1]`, or 0, to `ends[g]`."""

    ends: tuple[int, ...]
    on_device: Tensor | None = None
    """the same numbers [G], on the device of the rows; the Triton kernels need them"""

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Yield each group that has rows, with its rows."""
        start = 0
        for group, end in enumerate(self.ends):
            if end > start:
                yield group, slice(start, end)
            start = end


def grouped_product(
    rows: Tensor, matrices: Tensor, spans: Spans, out: Tensor, *, add: bool = False, alpha: float = 1.0
) -> Tensor:
    """Write alpha * rows_g M_g to the rows of each group g in `out`, or add it to them; return `out`.

    Args:
        rows: [n, K], contiguous.
        matrices: [G, K, N], with any strides.
        spans: rows of each group; together all n rows.
        out: [n, N], contiguous.
        add: add to `out` instead of overwriting it.
        alpha: factor of the products.
    """
    assert rows.is_contiguous()
    assert out.is_contiguous()
    PRODUCT(rows, matrices, spans, out, add, alpha)
    return out


def grouped_outer(x: Tensor, y: Tensor, spans: Spans, out: Tensor, *, alpha: float = 1.0) -> None:
    """Add alpha * x_g^T y_g to `out[g]` for each group g.

    Args:
        x: [n, I], contiguous; I is small, such as a rank.
        y: [n, J], contiguous.
        spans: rows of each group.
        out: [G, I, J], contiguous.
        alpha: factor of the products.
    """
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert out.is_contiguous()
    OUTER(x, y, spans, out, alpha)


def _product(rows: Tensor, matrices: Tensor, spans: Spans, out: Tensor, add: bool, alpha: float) -> None:
    if len(matrices) > 1:
        for group, here in spans.rows():
            _multiply(rows[here], matrices[group], out[here], add, alpha)
    else:
        _multiply(rows, matrices[0], out, add, alpha)


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor, add: bool, alpha: float) -> None:
    if add:
        out.addmm_(rows, matrix, alpha=alpha)
        return
    torch.mm(rows, matrix, out=out)
    if alpha != 1:
        out.mul_(alpha)


def _outer(x: Tensor, y: Tensor, spans: Spans, out: Tensor, alpha: float) -> None:
    if len(out) > 1:
        for group, here in spans.rows():
            out[group].addmm_(x[here].T, y[here], alpha=alpha)
    else:
        out[0].addmm_(x.T, y, alpha=alpha)


def _spans(device: torch.device) -> Spans:
    ends = (70, 70, 73, 133)  # one group has no rows
    return Spans(ends, torch.tensor(ends, device=device))


def _product_example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    matrices = numbers(device, dtype, 4, 150, 90, seed=1).transpose(1, 2)
    out = numbers(device, dtype, 133, 150, seed=2)
    return numbers(device, dtype, 133, 90), matrices, _spans(device), out, True, 0.5


def _outer_example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    out = numbers(device, dtype, 4, 6, 150, seed=2)
    return numbers(device, dtype, 133, 6), numbers(device, dtype, 133, 150, seed=1), _spans(device), out, 0.5


PRODUCT = FusedOp(_product, "grouped_product", _product_example)
OUTER = FusedOp(_outer, "grouped_outer", _outer_example)
