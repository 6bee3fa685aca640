"""Comparison of merged models with the live (unmerged) base + adapter on held-out text.

Per supervised token: KL(live || merged) over the whole vocabulary, the loss, and whether both models have the same
most likely token. The live model need not stay in memory: its last hidden states [N, H] and its output head are
enough, and far smaller than its distributions [N, V].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.data import Batch
from qlora.model.head import Head, head_of
from qlora.objective.causal_lm import supervised_states
from qlora.objective.step import evaluation_mode
from qlora.quantization import nf4
from qlora.quantization.expert_stack import expert_stacks

SIGNIFICANT_LOSS = 0.01
"""smallest difference of held-out loss (nats) that counts: 1% of perplexity"""

CHUNK = 1024
"""tokens whose logits are in memory at a time"""


@dataclass(frozen=True)
class Reference:
    """Outputs of the live base + adapter for every batch."""

    batches: Sequence[Batch]
    states: list[Tensor]
    """last hidden states of each batch's supervised tokens, [n, H], on the CPU"""
    head: Head
    """output head, on the CPU"""


@dataclass(frozen=True)
class Judgement:
    """Quality metrics of one model on the held-out text."""

    name: str
    kl: float
    """mean KL(live || this model) per supervised token, nats"""
    perplexity: float
    agreement: float
    """share of the supervised tokens for which both models have the same most likely token"""
    weight_bytes: int
    losses: Tensor = field(repr=False, compare=False)
    """loss of every supervised token, fp32 [N], nats"""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without the losses of single tokens."""
        return {
            "name": self.name,
            "kl": self.kl,
            "perplexity": self.perplexity,
            "agreement": self.agreement,
            "weight_bytes": self.weight_bytes,
        }


@torch.no_grad()
def reference(model: nn.Module, batches: Sequence[Batch]) -> Reference:
    """Run the live model on the batches and keep the outputs that `judge` needs."""
    with evaluation_mode(model):
        states = [supervised_states(model, batch)[0].cpu() for batch in batches]
    return Reference(batches, states, head_of(model).to("cpu"))


@torch.no_grad()
def judge(name: str, model: nn.Module, live: Reference, weight_bytes: int) -> Judgement:
    """Compare `model` with the live model on its batches. The model can be in training or evaluation mode."""
    head = head_of(model)
    live_head = live.head.to(head.weight.device)
    divergences, losses, agreements = [], [], []
    with evaluation_mode(model):
        for batch, live_states in zip(live.batches, live.states, strict=True):
            states, targets = supervised_states(model, batch)
            for ours, theirs, target in zip(
                states.split(CHUNK), live_states.split(CHUNK), targets.split(CHUNK), strict=True
            ):
                q = head.logits(ours).log_softmax(1)  # [n, V]
                p = live_head.logits(theirs.to(ours.device)).log_softmax(1)
                divergences.append(F.kl_div(q, p, log_target=True, reduction="none").sum(1).cpu())
                losses.append(F.nll_loss(q, target, reduction="none").cpu())
                agreements.append((q.argmax(1) == p.argmax(1)).float().cpu())
    loss = torch.cat(losses)
    return Judgement(
        name=name,
        kl=max(0.0, torch.cat(divergences).double().mean().item()),  # rounding can fall below zero
        perplexity=math.exp(loss.double().mean().item()),
        agreement=torch.cat(agreements).double().mean().item(),
        weight_bytes=weight_bytes,
        losses=loss,
    )


def choose(judged: Sequence[Judgement]) -> tuple[Judgement, str]:
    """Return the best merge in 16 bits, and the reason in one sentence, which also says what NF4 would cost.

    The one with the lowest KL to the live model is best, unless another one has a clearly lower perplexity. "Clearly"
    means by more than 1%, with a margin of two standard errors of the difference. NF4 is returned only if no other
    merge was judged.
    """
    nf4s = [one for one in judged if one.name == "nf4"]
    dense = sorted((one for one in judged if one.name != "nf4"), key=lambda one: one.kl)
    if not dense:
        return nf4s[0], "the only merged model that was compared"
    best = dense[0]
    why = f"closest to base + adapter (KL {best.kl:.4f} nats a token)"
    for other in dense[1:]:
        change, error = _loss_change(best, other)
        if change + error < -SIGNIFICANT_LOSS:
            why = f"its perplexity is {-_percent(change):.1f}% below that of {best.name}, which is closer to live"
            best = other
    for small in nf4s:
        change, error = _loss_change(best, small)
        ratio = small.weight_bytes / best.weight_bytes
        why += f"; nf4, in {ratio:.0%} of the bytes, changes the perplexity by {_percent(change):+.2f}%"
        if change + error < SIGNIFICANT_LOSS:
            why += " (less than 1%, with two standard errors to spare): --onto nf4 writes it"
        elif change < SIGNIFICANT_LOSS:
            why += ", but this text is too short to be sure that it is less than 1%"
    return best, why


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's weights in files: NF4 with its statistics, all other tensors in 16 bits."""
    packed = {module.weight: nf4.weight_bytes(module) for module in model.modules() if nf4.is_nf4(module)}
    packed |= {stack.weight: stack.storage_bytes() for stack in expert_stacks(model).values() if stack.packed}
    return sum(packed.get(parameter, 2 * parameter.numel()) for parameter in model.parameters())


def _loss_change(old: Judgement, new: Judgement) -> tuple[float, float]:
    """Return the mean loss of `new` minus that of `old` (nats), and two standard errors of the paired difference."""
    change = (new.losses - old.losses).double()
    error = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else math.inf
    return change.mean().item(), 2 * error


def _percent(loss_change: float) -> float:
    return 100 * math.expm1(loss_change)
