"""One autograd function for one or more adapted linears that read the same input.

All products are in the input's dtype. The backward keeps the input, A, B and the products with A. With a norm before
the linears, the norm's input is kept, which the residual stream holds anyway, and the normalised rows are recomputed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops.products import Linear, Update, gradients, project, to_ranks, unpack
from qlora.ops.rms_norm import Norm, input_gradient, normalized
from qlora.quantization.nf4 import autocast, frozen_linear


def lora_linear(x: Tensor, linear: Linear, update: Update) -> Tensor:
    """Apply a frozen linear plus its low-rank update (LoRA, Hu et al. 2021, equation 3) to x [..., in], in x.dtype.

    A and B can have any float dtype, and their gradients have the same. If A or B is None, only the frozen linear is
    applied.

    Returns:
        [..., out].
    """
    if update.a is None or update.b is None:
        return frozen_linear(x, linear.weight, linear.state, linear.bias)
    return lora_linears(x, [linear], [update])[0]


def lora_linears(
    x: Tensor, linears: Sequence[Linear], updates: Sequence[Update], norm: Norm | None = None
) -> tuple[Tensor, ...]:
    """Apply each linear with its update to x [..., in], normalised first if `norm` is given.

    Returns:
        The outputs of all linears, [..., out] each; a linear with `sizes` has several.
    """
    for linear in linears:
        linear.assert_frozen()
    grad = torch.is_grad_enabled()  # read here: always False inside the function
    flat = [tensor for update in updates for tensor in update]
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(autocast(x), norm, linears, grad, *flat)
    # Viewed here, because torch forbids a model to change a view made inside a function in place, as Falcon does
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm | None, linears: Sequence[Linear], grad: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = normalized(x.reshape(-1, x.shape[-1]), norm)
        updates, _ = unpack(flat, linears)
        lows = to_ranks(rows, linears, updates)
        outputs = project(rows, linears, updates, lows, fold=grad)
        # Attributes, not saved tensors: they are constants of the run, and hooks on saved tensors must not move them
        ctx.norm, ctx.linears = norm, linears
        ctx.save_for_backward(x, *flat, *lows)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        updates, lows = unpack(saved, ctx.linears)
        rows = x.reshape(-1, x.shape[-1])
        wants_input = ctx.needs_input_grad[0]
        dx, d_updates = gradients(
            normalized(rows, ctx.norm),
            list(grads),
            ctx.linears,
            updates,
            lows,
            wants_input=wants_input,
        )
        if dx is not None:
            input_gradient(dx, rows, ctx.norm)
            dx = dx.view(x.shape)
        return dx, None, None, None, *(tensor for update in d_updates for tensor in update)
