"""Softmax cross-entropy over the vocabulary, with its gradient from the same pass."""

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropies [n] in nats, with their gradient if `gradient` is given.

    The softmax is over softcap * tanh(logit_scale * logits / softcap), or logit_scale * logits without `softcap`.

    Args:
        logits: raw products of the head [n, V]; overwritten.
        targets: token ids [n].
        softcap: bound of the logits (Gemma 2).
        logit_scale: factor of the raw products.
        gradient: output [n, V] for the gradient of the sum of losses with respect to the raw products. It can be
            `logits` itself.
    """
    losses = logits.new_empty(len(logits))
    LOSS(logits, targets, softcap, logit_scale, gradient, losses)
    return losses


def _loss(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    gradient: Tensor | None,
    losses: Tensor,
) -> None:
    if logit_scale != 1.0:
        logits *= logit_scale
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = None if gradient is None else 1 - logits.square()
        logits *= softcap
    targets = targets[:, None]
    # log-sum-exp by hand, because torch's copies the logits
    highest = logits.amax(1, keepdim=True)
    target = logits.gather(1, targets)
    exponentials = logits.sub_(highest).exp_()
    total = exponentials.sum(1, keepdim=True)
    losses.copy_((highest + total.log() - target).squeeze(1))
    if gradient is None:
        return
    slopes = exponentials.div_(total)  # softmax
    slopes.scatter_add_(1, targets, torch.full_like(target, -1.0))
    if slope is not None:
        slopes *= slope
    if logit_scale != 1.0:
        slopes *= logit_scale
    if gradient is not logits:
        gradient.copy_(slopes)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    logits = numbers(device, dtype, 7, 5000)
    targets = torch.tensor([0, 4999, 17, 2048, 4096, 1, 3333], device=device)
    return logits, targets, 1.5, 0.7, logits, torch.empty_like(logits[:, 0].contiguous())


LOSS = FusedOp(_loss, "loss", _example)
