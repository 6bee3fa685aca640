"""A budget instead of knobs: the fastest way to run a recipe that is forecast to fit into so much memory.

With a frozen base an optimizer step is two passes of matrix products over the tokens, forward and input
gradients, and most of a third for every layer that is recomputed. What free memory can hold is therefore not
recomputed: checkpointing all layers costs up to half as much again. Where memory falls short, layers first give up
what their MLPs keep, and only when all have done so the rest. A byte costs about as much either way: at the shapes of
Llama 3.1 8B whole layers cost a tenth less of products, and attention besides, which is as much again from documents
of 4,096 tokens on. Each pass also dequantizes every weight once, however few the tokens, which speaks for large
micro-batches.
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

DEQUANTIZATION_TOKENS = 300
"""tokens whose products cost as much as dequantizing the weights once: on an H100 2.5 bytes a weight at 3 TB/s
against 2 FLOP at 790 TFLOP/s; a CPU is not far from it"""

SMALL_LOSS_CHUNK = 256


Progress = Callable[[str], object]
"""hears what is being tried"""


@dataclass(frozen=True)
class Policy:
    """The settings that a plan chooses."""

    micro_batch_size: int
    checkpointed_layers: int
    checkpointed_mlps: int
    """of the layers beside those"""
    offload: bool
    """the inputs of those that are recomputed are kept on the host"""
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
        """The recipe with these settings, and without a budget."""
        return changed(recipe, memory=None, **self.settings)


@dataclass(frozen=True)
class Plan(Policy):
    """A policy that fits, and what it is forecast to take."""

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
    """The settings with the least work a step among those forecast to fit.

    Args:
        recipe: its global batch stays; micro-batch, checkpointing and loss chunk are chosen. Inputs of layers go to
            the host if it says so, or if nothing fits else.
        workload_of: the largest batches of a recipe's run, for its micro-batch size.
        budget_bytes: of a GPU, paged optimizer state not counted, for it may leave.
        forecaster: of the recipe's architecture.
        progress: hears of each forecast before it is made.

    Raises:
        OutOfMemoryError: one row at a time with everything recomputed does not fit; says how much it takes.
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
            f"training.memory: one row at a time, every layer recomputed, is forecast to take "
            f"{unit.text(search.need(least).all_bytes)} of {unit.text(budget_bytes)}. `qlora estimate` with "
            "--gpu tells what else could be changed"
        )
    return Plan(
        **vars(best), layers=arch.layers, needed_bytes=search.need(best).all_bytes, budget_bytes=budget_bytes
    )


class _Need(NamedTuple):
    """What a policy takes, as `needed`, and at least how much of it with any other loss chunk."""

    all_bytes: int
    without_logits: int


class _Search:
    """Looks for the policy with the least work that fits; each is forecast once."""

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
        """The policy with the least work among those that fit, None if none does.

        With the same rows, a policy of more work takes less memory: where the last of those with less work than the
        best so far fits, bisection finds the first that does.
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
        """All ways to recompute, by work, from nothing to everything: MLPs first, then whole layers."""
        layers = self.forecaster.arch.layers
        _, mlp = self.recomputed
        counts = [(whole, 0 if mlp is None else layers - whole) for whole in range(layers + 1)]
        if mlp is not None:
            counts = [*((0, mlps) for mlps in range(layers)), *counts]
        return [
            Policy(rows, whole, mlps, offload and whole > 0, self.loss_chunks[0]) for whole, mlps in counts
        ]

    def fitting(self, policy: Policy) -> Policy | None:
        """The policy with the largest loss chunk that fits, None if none does."""
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
        found = self.forecaster.forecast(policy.apply(self.recipe), workload)
        _, parts = found.trace.peak()
        size = needed(found)
        return _Need(size, size - parts["logits_and_loss"] - parts["allocator_slack"])

    def work(self, policy: Policy) -> float:
        """Work of a step in tokens through all weights."""
        whole, mlp = self.recomputed
        recomputed = whole * policy.checkpointed_layers + (mlp or 0) * policy.checkpointed_mlps
        passes = 2 + recomputed / max(1, self.forecaster.arch.layers)
        batch = self.workload(policy.micro_batch_size, policy.loss_chunk).train
        tokens = batch.input_ids.shape[1] * self.recipe.training.global_batch_size
        micro_batches = self.recipe.training.global_batch_size / policy.micro_batch_size
        return passes * (tokens + DEQUANTIZATION_TOKENS * micro_batches)


def needed(found: Forecast) -> int:
    """Bytes of the device that a run cannot do without: paged optimizer state may move to the host."""
    _, parts = found.trace.peak()
    return sum(parts.values()) - parts["optimizer_state_paged"]


def changed(recipe: Recipe, **training: object) -> Recipe:
    """The recipe with other `training` settings, each as a recipe states it."""
    checked = Training.model_validate(training)
    update = {name: getattr(checked, name) for name in training}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=update)})


def sized(recipe: Recipe, workload: Workload) -> Workload:
    """`workload` with the recipe's micro-batch size, and rows no longer than it allows."""
    tokens = min(workload.train.input_ids.shape[1], recipe.data.max_length)
    return resized(workload, rows=recipe.training.micro_batch_size, tokens=tokens)
