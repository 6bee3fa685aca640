"""Adapted linears that read the same input, as one autograd function; the plain case is one of them.

Everything is computed in the input's dtype. Kept for the backward are the input, A, B and the rank-wide products.
With a norm before the linears it is the norm's input that is kept, which the residual stream holds anyway; the
normalised rows are rebuilt.
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
    """Frozen linear plus low-rank update (LoRA, Hu et al. 2021, equation 3): [..., in] -> [..., out].

    A and B are of any float dtype, in which their gradients come back; both None give the frozen linear alone.
    Computes in x.dtype.
    """
    if update.a is None or update.b is None:
        return frozen_linear(x, linear.weight, linear.state, linear.bias)
    return lora_linears(x, [linear], [update])[0]


def lora_linears(
    x: Tensor, linears: Sequence[Linear], updates: Sequence[Update], norm: Norm | None = None
) -> tuple[Tensor, ...]:
    """What each linear, with its update, makes of x [..., in], or of its normalisation: [..., out] each."""
    for linear in linears:
        linear.assert_frozen()
    grad = torch.is_grad_enabled()  # always False inside the function
    flat = [tensor for update in updates for tensor in update]
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(autocast(x), norm, linears, grad, *flat)
    return outputs


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm | None, linears: Sequence[Linear], grad: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = normalized(x.reshape(-1, x.shape[-1]), norm)
        updates, _ = unpack(flat, linears)
        lows = to_ranks(rows, linears, updates)
        outputs = project(rows, linears, updates, lows, fold=grad)
        # Weights stay attributes: constants of the run, which hooks on saved tensors must not move
        ctx.norm, ctx.linears = norm, linears
        ctx.save_for_backward(x, *flat, *lows)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        updates, lows = unpack(saved, ctx.linears)
        rows = x.reshape(-1, x.shape[-1])
        wants_input = ctx.needs_input_grad[0]
        dx, d_updates = gradients(
            normalized(rows, ctx.norm),
            [grad.reshape(-1, grad.shape[-1]) for grad in grads],
            ctx.linears,
            updates,
            lows,
            wants_input=wants_input,
        )
        if dx is not None:
            input_gradient(dx, rows, ctx.norm)
            dx = dx.view(x.shape)
        return dx, None, None, None, *(tensor for update in d_updates for tensor in update)
