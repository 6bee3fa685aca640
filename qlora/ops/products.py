"""Matrix products of frozen linears with low-rank updates, and their gradients.

W is frozen, so it has no gradient. For rows x, s = scaling and g = dL/dy:
    y = x W^T + bias + s (x A^T) B^T
    dB = s g^T (x A^T)    dA = s (g B)^T x    dx = g W + s (g B) A
W is dequantized once per pass and not kept. In float32 the update is added to the dequantized W, which costs one pass
over the weight. In 16 bits the update would be lost to rounding there, so it is added to the output instead.

For linears that read the same rows, the products of all A with the rows are one product, and so are the gradients of
all A. A linear whose weight stacks several matrices, such as gate and up, has one A and one B, and an output for each
matrix. These are plain functions on rows [tokens, features], which autograd does not see.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.ops.dropout import Dropout
from qlora.quantization.nf4 import QuantState, assert_frozen, dense


class Linear(NamedTuple):
    """Constants of a linear with a low-rank update."""

    weight: Tensor
    """packed NF4 with its `state`, or dense [out, in] with state None"""
    state: QuantState | None
    bias: Tensor | None
    """[out]"""
    scaling: float = 1.0
    dropout: Dropout | None = None
    """mask of the input of A"""
    sizes: tuple[int, ...] = ()
    """rows of W for each output of a linear with several outputs; () for one output"""

    @property
    def parts(self) -> list[slice]:
        """Rows of W, of the bias and of B for each output."""
        ends = accumulate(self.sizes)
        return [slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True)] or [slice(None)]

    @property
    def factor(self) -> float:
        """Factor of the update: the scaling, times the rescaling of dropout."""
        return self.scaling if self.dropout is None else self.scaling / (1 - self.dropout.rate)

    def dropped(self, rows: Tensor) -> Tensor:
        """Return rows [N, in] times the mask / (1 - rate), the same at every call; without dropout, the rows."""
        if self.dropout is None:
            return rows
        return (rows * self.dropout.mask(rows)).div_(1 - self.dropout.rate)

    def assert_frozen(self) -> None:
        """Assert that weight and bias require no gradient."""
        assert_frozen(self.weight, self.bias)


class Update(NamedTuple):
    """A [rank, in] and B [out, rank] of a linear; both None without an update."""

    a: Tensor | None
    b: Tensor | None


def unpack(
    tensors: Sequence[Tensor | None], linears: Sequence[Linear]
) -> tuple[list[Update], list[Tensor | None]]:
    """Split a flat list into the updates of the linears (A, B, A, B, ...) and the remaining tensors."""
    count = 2 * len(linears)
    return [Update(*tensors[start : start + 2]) for start in range(0, count, 2)], list(tensors[count:])


def to_ranks(rows: Tensor, linears: Sequence[Linear], updates: Sequence[Update]) -> list[Tensor | None]:
    """Multiply rows [N, in] by each A^T; return [N, rank] each, or None without A. Keep them for the backward."""
    adapted = [update.a for update in updates if update.a is not None]
    if any(linear.dropout for linear in linears) or len(adapted) < 2:
        return [
            None if a is None else _dropped(rows, _mask(rows, linear)) @ a.to(rows.dtype).T
            for linear, (a, _) in zip(linears, updates, strict=True)
        ]
    together = rows @ torch.cat([a.to(rows.dtype) for a in adapted]).T
    parts = iter(together.split([len(a) for a in adapted], dim=1))
    return [None if a is None else next(parts) for a, _ in updates]


def project(
    rows: Tensor,
    linears: Sequence[Linear],
    updates: Sequence[Update],
    lows: Sequence[Tensor | None],
    *,
    fold: bool = True,
) -> list[Tensor]:
    """Apply each linear with its update to rows [N, in]; return all outputs [N, out].

    Args:
        rows: input of all linears.
        linears: constants of each linear.
        updates: A and B of each linear.
        lows: output of `to_ranks` for these rows.
        fold: allow adding an update to the dequantized weight where this is exact up to rounding.
    """
    outputs = []
    for linear, (a, b), low in zip(linears, updates, lows, strict=True):
        weight = dense(linear.weight, linear.state, rows.dtype)
        bias = None if linear.bias is None else linear.bias.to(rows.dtype)
        if a is None or b is None or low is None:
            outputs += _outputs(rows, weight, bias, linear)
        elif fold and _foldable(linear, rows, weight):
            outputs += _outputs(rows, _folded(weight, linear, a, b), bias, linear)
        else:
            for y, part in zip(_outputs(rows, weight, bias, linear), linear.parts, strict=True):
                outputs.append(y.addmm_(low, b[part].to(rows.dtype).T, alpha=linear.factor))
    return outputs


def gradients(
    rows: Tensor,
    grads: Sequence[Tensor],
    linears: Sequence[Linear],
    updates: Sequence[Update],
    lows: Sequence[Tensor | None],
    *,
    wants_input: bool = True,
) -> tuple[Tensor | None, list[Update]]:
    """Return dL/dx [N, in] of the shared rows and the gradients of each A and B, from dL/dy [N, out] of each output."""
    remaining = iter(grads)
    by_linear = [[next(remaining) for _ in linear.parts] for linear in linears]
    low_grads = [
        None if b is None else _low_gradient(own, linear, b)
        for own, linear, (_, b) in zip(by_linear, linears, updates, strict=True)
    ]
    masks = [_mask(rows, linear) for linear in linears]
    d_as = _a_gradients(rows, low_grads, updates, masks)
    d_bs = [
        None if b is None or low is None else _b_gradient(own, low).mul_(linear.factor).to(b.dtype)
        for own, linear, (_, b), low in zip(by_linear, linears, updates, lows, strict=True)
    ]
    dx = None
    for number in range(len(linears) if wants_input else 0):
        dx = _input_gradient(
            by_linear[number], linears[number], updates[number], low_grads[number], masks[number], dx
        )
    return dx, [Update(a, b) for a, b in zip(d_as, d_bs, strict=True)]


def _outputs(rows: Tensor, weight: Tensor, bias: Tensor | None, linear: Linear) -> list[Tensor]:
    """Multiply rows [N, in] by the dense weight; return each output of the linear, contiguous."""
    return [F.linear(rows, weight[part], None if bias is None else bias[part]) for part in linear.parts]


def _low_gradient(grads: Sequence[Tensor], linear: Linear, b: Tensor) -> Tensor:
    """Return s dL/dy B [N, rank], summed over the outputs."""
    total, *others = (grad @ b[part].to(grad.dtype) for grad, part in zip(grads, linear.parts, strict=True))
    for other in others:
        total.add_(other)
    return total.mul_(linear.factor)


def _b_gradient(grads: Sequence[Tensor], low: Tensor) -> Tensor:
    """Return dL/dy^T (x A^T) [out, rank], with the rows of all outputs."""
    products = [grad.T @ low for grad in grads]
    return products[0] if len(products) == 1 else torch.cat(products)


def _a_gradients(
    rows: Tensor,
    low_grads: Sequence[Tensor | None],
    updates: Sequence[Update],
    masks: Sequence[Tensor | None],
) -> list[Tensor | None]:
    present = [low_grad for low_grad in low_grads if low_grad is not None]
    if len(present) < 2 or any(mask is not None for mask in masks):
        return [
            None if low_grad is None or a is None else (low_grad.T @ _dropped(rows, mask)).to(a.dtype)
            for low_grad, (a, _), mask in zip(low_grads, updates, masks, strict=True)
        ]
    together = torch.cat(present, dim=1).T @ rows
    parts = iter(together.split([low_grad.shape[1] for low_grad in present]))
    return [None if a is None else next(parts).to(a.dtype, copy=True) for a, _ in updates]


def _input_gradient(
    grads: Sequence[Tensor],
    linear: Linear,
    update: Update,
    low_grad: Tensor | None,
    mask: Tensor | None,
    into: Tensor | None,
) -> Tensor:
    """Return dL/dx [N, in] for the gradients dL/dy [N, out] of one linear; added to `into` in place if given."""
    dtype = grads[0].dtype
    weight, (a, b) = dense(linear.weight, linear.state, dtype), update
    if a is None or b is None or low_grad is None:
        return _product(grads, weight, linear, into)
    if _foldable(linear, grads[0], weight):
        return _product(grads, _folded(weight, linear, a, b), linear, into)
    dx = _product(grads, weight, linear, into)
    if mask is None:
        return dx.addmm_(low_grad, a.to(dtype))
    return dx.add_((low_grad @ a.to(dtype)).mul_(mask))


def _product(grads: Sequence[Tensor], weight: Tensor, linear: Linear, into: Tensor | None) -> Tensor:
    """Return dL/dy W [N, in], summed over the outputs and added to `into` in place if given."""
    for grad, part in zip(grads, linear.parts, strict=True):
        into = grad @ weight[part] if into is None else into.addmm_(grad, weight[part])
    assert into is not None
    return into


def _mask(rows: Tensor, linear: Linear) -> Tensor | None:
    return None if linear.dropout is None else linear.dropout.mask(rows)


def _dropped(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def _foldable(linear: Linear, rows: Tensor, weight: Tensor) -> bool:
    """Return True if adding the update to the weight is exact enough, the same for all rows, and less work."""
    exact = weight.dtype in (torch.float32, torch.float64)
    return exact and not linear.dropout and len(rows) * sum(weight.shape) > weight.numel()


def _folded(weight: Tensor, linear: Linear, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    if linear.state is None:  # a dense weight belongs to the base: do not write into it
        return torch.addmm(weight, b, a, alpha=linear.factor)
    return weight.addmm_(b, a, alpha=linear.factor)
