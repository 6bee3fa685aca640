"""Plan for a memory budget: the fastest settings of a recipe that are forecast to fit.

With a frozen base an optimizer step takes two passes of matrix products over the tokens (forward and input gradients),
and most of a third pass for every recomputed layer. Checkpointing all layers therefore costs up to half as much again,
so a plan recomputes no more than memory requires. It first recomputes MLPs alone, and whole layers only once all MLPs
are recomputed. Both cost about the same for each byte saved: at the shapes of Llama 3.1 8B, whole layers repeat a tenth
fewer products, but also the attention, which costs that tenth with documents of about 4,096 tokens. Each pass also
dequantizes every weight once, for any number of tokens, so large micro-batches are faster.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from qlora.errors import OutOfMemoryError
from qlora.memory.forecast import Forecast, Forecaster
from qlora.memory.workload import Workload, resized
from qlora.recipe import Recipe, Training
from qlora.recipe.sizes import unit_for
from qlora.runtime.progress import Progress

DEQUANTIZATION_TOKENS = 300
"""tokens whose products take as long as dequantizing the weights once: on an H100 2.5 bytes a weight at 3 TB/s
compared with 2 FLOP at 790 TFLOP/s; similar on a CPU"""

SMALL_LOSS_CHUNK = 256
"""loss chunk that plans and advice try if the recipe's own does not fit"""


@dataclass(frozen=True)
class Policy:
    """The settings that a plan chooses."""

    micro_batch_size: int
    checkpointed_layers: int
    checkpointed_mlps: int
    """further layers, of which only the MLP is recomputed"""
    offload: bool
    """True if the inputs of recomputed layers are kept on the host"""
    loss_chunk: int

    @property
    def settings(self) -> dict[str, Any]:
        """The plan as keys of the recipe's section `training`."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "activation_checkpointing": {"full": self.checkpointed_layers, "mlp": self.checkpointed_mlps},
            "activation_offloading": self.offload,
            "loss_chunk": self.loss_chunk,
        }

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these settings and without a budget."""
        return changed(recipe, memory=None, **self.settings)


@dataclass(frozen=True)
class Plan(Policy):
    """A policy that fits, and its forecast memory."""

    layers: int
    needed_bytes: int
    budget_bytes: int

    @property
    def why(self) -> str:
        """The plan in one line."""
        recomputed = f"{self.checkpointed_layers} of {self.layers} layers"
        if self.checkpointed_layers in (0, self.layers):
            recomputed = f"all {self.layers} layers" if self.checkpointed_layers else "no layer"
        more = f", the MLP alone in {self.checkpointed_mlps}" if self.checkpointed_mlps else ""
        offload = "activation_offloading=true, " if self.offload else ""
        unit = unit_for(self.budget_bytes)
        return (
            f"plan for {unit.text(self.budget_bytes)}: micro_batch_size={self.micro_batch_size}, "
            f"activation_checkpointing={{full: {self.checkpointed_layers}, mlp: {self.checkpointed_mlps}}}, "
            f"{offload}loss_chunk={self.loss_chunk} "
            f"({recomputed} recomputed{more}); forecast {unit.text(self.needed_bytes)}"
        )


def plan(
    recipe: Recipe,
    workload_of: Callable[[Recipe], Workload],
    budget_bytes: int,
    forecaster: Forecaster,
    progress: Progress | None = None,
) -> Plan:
    """Find the settings with the least work a step among those that are forecast to fit.

    Args:
        recipe: the recipe. Its global batch stays; micro-batch size, checkpointing and loss chunk are chosen. Layer
            inputs are offloaded to the host if the recipe asks for it, or if nothing else fits.
        workload_of: returns the largest batches of a recipe's run, which depend on its micro-batch size.
        budget_bytes: device memory. Paged optimizer state does not count, because it can move to the host.
        forecaster: forecaster for the recipe's architecture.
        progress: called with a line of text before each forecast.

    Raises:
        OutOfMemoryError: one row at a time with everything recomputed does not fit; the message states its size.
    """
    search = _Search(recipe, workload_of, budget_bytes, forecaster, progress)
    arch, offload = forecaster.arch, recipe.training.activation_offloading
    best = search.best(offload)
    if best is None and forecaster.cuda and not offload:
        offload = True
        best = search.best(offload)
    if best is None:
        least = Policy(1, arch.layers, 0, offload and arch.layers > 0, search.loss_chunks[-1])
        unit = unit_for(budget_bytes)
        raise OutOfMemoryError(
            "training.memory: one row at a time with every layer recomputed needs "
            f"{unit.text(search.need(least).all_bytes)} by forecast, but the budget is {unit.text(budget_bytes)}. "
            "Run `qlora estimate` with --gpu to see what else can be changed"
        )
    return Plan(
        **vars(best), layers=arch.layers, needed_bytes=search.need(best).all_bytes, budget_bytes=budget_bytes
    )


class _Need(NamedTuple):
    """Memory of a policy: `needed`, and a lower bound for any other loss chunk."""

    all_bytes: int
    without_logits: int


class _Search:
    """Search for the policy with the least work that fits. Each policy is forecast once."""

    def __init__(
        self,
        recipe: Recipe,
        workload_of: Callable[[Recipe], Workload],
        budget_bytes: int,
        forecaster: Forecaster,
        progress: Progress | None,
    ) -> None:
        self.recipe, self.budget_bytes, self.forecaster = recipe, budget_bytes, forecaster
        self.progress = progress
        self.recomputed = forecaster.arch.recomputed
        whole = forecaster.arch.loss_chunk(recipe)
        self.loss_chunks = sorted({whole, min(whole, SMALL_LOSS_CHUNK)}, reverse=True)
        self.workload = cache(
            lambda rows, chunk: workload_of(
                changed(recipe, memory=None, micro_batch_size=rows, loss_chunk=chunk)
            )
        )
        self.need = cache(self._need)

    def best(self, offload: bool) -> Policy | None:
        """Return the policy with the least work among those that fit; None if none fits.

        With the same number of rows, a policy with more work takes less memory. So bisection finds the policy with the
        least work that fits, among those with less work than the best so far.
        """

        def fits(policy: Policy) -> bool:
            return self.fitting(policy) is not None

        best = None
        total = self.recipe.training.global_batch_size
        for rows in (rows for rows in range(1, total + 1) if total % rows == 0):
            better = self.policies(rows, offload)
            if best is not None:
                limit = self.work(best)
                better = [policy for policy in better if self.work(policy) < limit]
            if better and fits(better[-1]):
                first = 0 if fits(better[0]) else bisect_left(better, True, key=fits)
                best = self.fitting(better[first])
        return best

    def policies(self, rows: int, offload: bool) -> list[Policy]:
        """Return all policies in order of work, from no recomputation to all: MLPs first, then whole layers."""
        layers = self.forecaster.arch.layers
        _, mlp = self.recomputed
        counts = [(whole, 0 if mlp is None else layers - whole) for whole in range(layers + 1)]
        if mlp is not None:
            counts = [*((0, mlps) for mlps in range(layers)), *counts]
        return [
            Policy(rows, whole, mlps, offload and whole > 0, self.loss_chunks[0]) for whole, mlps in counts
        ]

    def fitting(self, policy: Policy) -> Policy | None:
        """Return the policy with the largest loss chunk that fits; None if none fits."""
        for chunk in self.loss_chunks:
            policy = replace(policy, loss_chunk=chunk)
            need = self.need(policy)
            if need.all_bytes <= self.budget_bytes:
                return policy
            if need.without_logits > self.budget_bytes:
                return None
        return None

    def _need(self, policy: Policy) -> _Need:
        if self.progress is not None:
            self.progress(
                f"planning: {policy.micro_batch_size} rows at a time, {policy.checkpointed_layers} layers and "
                f"{policy.checkpointed_mlps} MLPs recomputed, logits of {policy.loss_chunk} tokens"
            )
        workload = self.workload(policy.micro_batch_size, policy.loss_chunk)
        forecast = self.forecaster.forecast(policy.apply(self.recipe), workload)
        _, parts = forecast.trace.peak()
        size = needed(forecast)
        return _Need(size, size - parts["logits_and_loss"] - parts["allocator_slack"])

    def work(self, policy: Policy) -> float:
        """Return the work of a step, in tokens that pass through all weights."""
        whole, mlp = self.recomputed
        recomputed = whole * policy.checkpointed_layers + (mlp or 0) * policy.checkpointed_mlps
        passes = 2 + recomputed / max(1, self.forecaster.arch.layers)
        batch = self.workload(policy.micro_batch_size, policy.loss_chunk).train
        tokens = batch.input_ids.shape[1] * self.recipe.training.global_batch_size
        micro_batches = self.recipe.training.global_batch_size / policy.micro_batch_size
        return passes * (tokens + DEQUANTIZATION_TOKENS * micro_batches)


def needed(forecast: Forecast) -> int:
    """Return the device bytes that a run requires. Paged optimizer state does not count: it can move to the host."""
    _, parts = forecast.trace.peak()
    return sum(parts.values()) - parts["optimizer_state_paged"]


def changed(recipe: Recipe, **training: object) -> Recipe:
    """Return the recipe with other `training` settings, given in the form of a recipe."""
    checked = Training.model_validate(training)
    update = {name: getattr(checked, name) for name in training}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=update)})


def sized(recipe: Recipe, workload: Workload) -> Workload:
    """Return `workload` with the recipe's micro-batch size, its rows cut to the recipe's maximum length."""
    tokens = min(workload.train.input_ids.shape[1], recipe.data.max_length)
    return resized(workload, rows=recipe.training.micro_batch_size, tokens=tokens)
