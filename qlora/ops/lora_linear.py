"""The adapted linear: y = x W^T + bias + scaling * dropout(x) A^T B^T, with its gradients written out.

W is frozen, in NF4 or dense, so there is no weight gradient. With g = dL/dy, xd = dropout(x), s = scaling:
    dB = s g^T (xd A^T)    dA = s (g B)^T xd    dx = g W + s dropout'(g B A)
Everything is computed in x.dtype; W is dequantized once a pass and never kept. Saved for the backward are x,
the rank-wide xd A^T, A, B, and with dropout its mask (a byte an element).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.nf4 import QuantState, assert_frozen, autocast, dense, frozen_linear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Frozen linear plus low-rank update (LoRA, Hu et al. 2021, equation 3): [..., in] -> [..., out].

    `weight` is packed NF4 with its `quant_state`, or dense [out, in] with None; `bias` is [out] or None;
    `lora_a` [rank, in] and `lora_b` [out, rank] are of any float dtype, in which their gradients come back;
    both None give the frozen linear alone. `dropout`, of the input of A, acts in training only; its mask
    comes from the device's global generator, so torch's checkpointing replays it. Computes in x.dtype.
    """
    if lora_a is None or lora_b is None:
        return frozen_linear(x, weight, quant_state, bias)
    assert_frozen(weight, bias)
    p = dropout if training else 0.0
    y: Tensor = _LoRALinear.apply(autocast(x), weight, quant_state, bias, lora_a, lora_b, scaling, p)
    return y


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: QuantState | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - p) if p else None
        scaling = scaling / (1 - p)  # dropout's rescaling, folded into a number
        low = _drop(rows, mask) @ lora_a.to(x.dtype).T
        y = F.linear(rows, dense(weight, state, x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(low, lora_b.to(x.dtype).T, alpha=scaling)
        # The weight stays an attribute: a constant of the run, which hooks on saved tensors must not move
        ctx.weight, ctx.state, ctx.scaling = weight, state, scaling
        ctx.save_for_backward(x, mask, low, lora_a, lora_b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, low, lora_a, lora_b = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        dx = da = db = None
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_b:
            db = (rows.T @ low).mul_(ctx.scaling).to(lora_b.dtype)
        low_grad = (rows @ lora_b.to(grad.dtype)).mul_(ctx.scaling)  # [tokens, rank]: dL/d(xd A^T)
        if needs_a:
            da = (low_grad.T @ _drop(x.reshape(-1, x.shape[-1]), mask)).to(lora_a.dtype)
        if needs_x:
            dx = rows @ dense(ctx.weight, ctx.state, grad.dtype)
            if mask is None:
                dx.addmm_(low_grad, lora_a.to(grad.dtype))
            else:
                dx += _drop(low_grad @ lora_a.to(grad.dtype), mask)
            dx = dx.view(x.shape)
        return dx, None, None, None, da, db, None, None


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
