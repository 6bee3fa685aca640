"""Allocation of AdaLoRA's ranks during a run (Zhang et al. 2023, arXiv:2303.10512, sections 3.1 and 3.2).

The update of a layer is a sum of triplets: a column of P, a singular value, a row of Q. (PEFT's names, and ours: B, E
and A.) After every update by the optimizer, each number w of a triplet has the sensitivity |w * gradient of w|
(equation 8). Its average over the steps (equation 9), times the average distance from that average (equation 10), is
the importance of the number. A triplet's importance is that of its singular value plus the means over its column and
its row (equation 7).

The budget, the number of triplets of all layers together, falls with the cube of the time that is left (equation 12):
    b(t) = b0                                            t <= t_i
           bT + (b0 - bT) (1 - (t - t_i) / (T - t_f - t_i))^3
           bT                                            t >= T - t_f
At a change of the budget, the singular values of the least important triplets become zero; they can return until T -
t_f. At the end of the run the triplets that were left out are removed.

The penalty (equation 4) keeps P and Q orthogonal, so that a triplet can be judged by itself. As in the authors' code,
the norms are not squared, and the penalty is the mean over all matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.adapter.methods.course import Course

PARTS = ("lora_a", "lora_b", "lora_e")


class Triplets(Protocol):
    """A layer whose update is B diag(E) A."""

    lora_a: nn.Parameter
    """[rank, in]"""
    lora_b: nn.Parameter
    """[out, rank]"""
    lora_e: nn.Parameter
    """[rank, 1]"""

    @property
    def rank(self) -> int: ...
    def prune(self, kept: Tensor) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """Budget over a run (equation 12)."""

    start: int
    """t_i, steps with all triplets"""
    end: int
    """T - t_f, the step from which the triplets stay the same"""
    every: int
    """steps from one change to the next"""
    first: int
    """b0, triplets at the start"""
    last: int
    """bT, triplets at the end"""

    def budget(self, step: int) -> int | None:
        """Return the number of triplets after `step` steps, if it changes there or the triplets become final."""
        if step == self.end:
            return self.last
        if not self.start < step < self.end or step % self.every:
            return None
        left = 1 - (step - self.start) / (self.end - self.start)
        return int((self.first - self.last) * left**3 + self.last)


class RankAllocation(Course):
    """AdaLoRA's course: the penalty, the importance of the triplets, and their choice.

    Args:
        layers: the adapted layers by name.
        schedule: the budget over the run.
        orthogonality: weight of the penalty, gamma.
        decays: decay rates of the averages, beta1 and beta2.
    """

    def __init__(
        self,
        layers: Mapping[str, Triplets],
        schedule: Schedule,
        orthogonality: float,
        decays: tuple[float, float],
    ) -> None:
        self.layers, self.schedule, self.orthogonality, self.decays = (
            dict(layers),
            schedule,
            orthogonality,
            decays,
        )
        self.kept = {
            name: torch.ones(layer.rank, dtype=torch.bool, device=layer.lora_e.device)
            for name, layer in layers.items()
        }
        """the triplets of each layer that the last choice kept"""
        # fp32: averages of bf16 numbers over many steps
        self._averages = {
            (name, part): torch.zeros(2, *getattr(layer, part).shape, device=layer.lora_e.device)
            for name, layer in layers.items()
            for part in PARTS
        }

    def penalty(self) -> Tensor | None:
        """Return gamma times the mean distance of P^T P and Q Q^T from the identity."""
        if not self.orthogonality:
            return None
        distances = [
            _Distance.apply(rows) for layer in self.layers.values() for rows in (layer.lora_a, layer.lora_b.T)
        ]
        return torch.stack(distances).mean() * self.orthogonality

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the importance, and choose the triplets if the schedule says so."""
        taken, end = step + 1, self.schedule.end
        if taken < end:
            self._measure()
        if taken <= end and (budget := self.schedule.budget(taken)) is not None:
            self._choose(budget)
            self._mask()
        elif taken > end:
            self._mask()

    @torch.no_grad()
    def finish(self) -> None:
        """Remove the triplets that were left out; choose them first if the run was cut short at a resume."""
        if sum(int(kept.sum()) for kept in self.kept.values()) > self.schedule.last:
            self._choose(self.schedule.last)
        for name, layer in self.layers.items():
            layer.prune(self.kept[name])

    def state(self) -> dict[str, Tensor]:
        """Return the averages and the triplets that are kept."""
        averages = {f"{name}.{part}": average for (name, part), average in self._averages.items()}
        return averages | {f"{name}.kept": kept for name, kept in self.kept.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def outcome(self) -> dict[str, Any]:
        """Return the rank of each layer."""
        ranks = {name: int(kept.sum()) for name, kept in self.kept.items()}
        mean = sum(ranks.values()) / len(ranks)
        summary = f"ranks from {min(ranks.values())} to {max(ranks.values())}, {mean:.3g} on average"
        return {"summary": summary, "ranks": ranks}

    def _measure(self) -> None:
        """Add the sensitivities of this step to the averages (equations 8 to 10)."""
        smooth, spread = self.decays
        for (name, part), (mean, distance) in self._averages.items():
            parameter = getattr(self.layers[name], part)
            sensitivity = (parameter.float() * parameter.grad).abs_()
            mean.lerp_(sensitivity, 1 - smooth)
            distance.lerp_(sensitivity.sub_(mean).abs_(), 1 - spread)

    def importance(self, name: str) -> Tensor:
        """Return the importance of the triplets of a layer, [rank] (equation 7)."""
        a, b, e = (self._averages[name, part].prod(dim=0) for part in PARTS)
        return e.view(-1) + a.mean(dim=1) + b.mean(dim=0)

    def _choose(self, budget: int) -> None:
        """Keep the `budget` most important triplets of all layers; of equal ones the first."""
        sizes = [len(kept) for kept in self.kept.values()]
        scores = torch.cat([self.importance(name) for name in self.kept])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = True
        for own, part in zip(self.kept.values(), kept.split(sizes), strict=True):
            own.copy_(part)

    def _mask(self) -> None:
        """Set the singular values of the triplets that are not kept to zero."""
        for name, layer in self.layers.items():
            layer.lora_e[~self.kept[name]] = 0.0


class _Distance(torch.autograd.Function):
    """Frobenius norm of X X^T - I for X [rank, n]. It saves X and a matrix [rank, rank], and no fp32 copy of X."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        difference = wide @ wide.T
        difference.diagonal().sub_(1)
        distance = torch.linalg.vector_norm(difference)
        ctx.save_for_backward(rows, difference, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows, difference, distance = ctx.saved_tensors
        wide = rows.to(difference.dtype)
        tiny = torch.finfo(difference.dtype).tiny  # the gradient at zero distance is zero
        return ((difference @ wide) * (2 * grad / distance.clamp(min=tiny))).to(rows.dtype)
