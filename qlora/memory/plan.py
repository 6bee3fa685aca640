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
from dataclasses import dataclass, field, replace
from typing import Any

from qlora.errors import OutOfMemoryError
from qlora.memory.architecture import Architecture
from qlora.memory.forecast import Forecast, forecast
from qlora.memory.workload import Workload, resized
from qlora.recipe import Recipe, Training
from qlora.recipe.sizes import unit_for

DEQUANTIZATION_TOKENS = 300
"""tokens whose products cost as much as dequantizing the weights once: on an H100 2.5 bytes a weight at 3 TB/s
against 2 FLOP at 790 TFLOP/s; a CPU is not far from it"""

SMALL_LOSS_CHUNK = 256


@dataclass(frozen=True)
class Plan:
    """Settings that fit, and what they are forecast to take."""

    micro_batch_size: int
    checkpointed_layers: int
    checkpointed_mlps: int
    """of the layers beside those"""
    layers: int
    offload: bool
    """the inputs of those that are recomputed are kept on the host"""
    loss_chunk: int
    needed_bytes: int
    budget_bytes: int

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
    arch: Architecture,
    workload_of: Callable[[Recipe], Workload],
    budget_bytes: int,
    *,
    cuda: bool,
) -> Plan:
    """The settings with the least work a step among those forecast to fit.

    Args:
        recipe: its global batch stays; micro-batch, checkpointing and loss chunk are chosen. Inputs of layers go to
            the host if it says so, or if nothing fits else.
        workload_of: the largest batches of a recipe's run, for its micro-batch size.
        budget_bytes: of a GPU, paged optimizer state not counted, for it may leave.

    Raises:
        OutOfMemoryError: one row at a time with everything recomputed does not fit; says how much it takes.
    """
    search = _Search(recipe, arch, workload_of, budget_bytes, cuda)
    fitting: list[Plan] = []
    total = recipe.training.global_batch_size
    for rows in (rows for rows in range(1, total + 1) if total % rows == 0):
        least = search.run(rows, search.levels, arch.loss_chunk(recipe))
        if least.needed_bytes > budget_bytes:
            break
        fitting.append(least)
    if not fitting:
        fitting = [search.run(1, search.levels, min(SMALL_LOSS_CHUNK, arch.loss_chunk(recipe)))]
        if fitting[0].needed_bytes > budget_bytes and cuda and not recipe.training.activation_offloading:
            return plan(
                changed(recipe, activation_offloading=True), arch, workload_of, budget_bytes, cuda=cuda
            )
        if fitting[0].needed_bytes > budget_bytes:
            unit = unit_for(budget_bytes)
            raise OutOfMemoryError(
                f"training.memory: one row at a time, every layer recomputed, is forecast to take "
                f"{unit.text(fitting[0].needed_bytes)} of {unit.text(budget_bytes)}. `qlora estimate` with "
                "--gpu tells what else could be changed"
            )
    best = search.least_work(fitting.pop())
    for least in reversed(fitting):
        if search.work(replace(least, checkpointed_layers=0, checkpointed_mlps=0)) < search.work(best):
            best = min(best, search.least_work(least), key=search.work)
    level = search.level(best)
    if level and best.loss_chunk > SMALL_LOSS_CHUNK:
        # Smaller pieces of logits may make room for another layer
        smaller = search.run(best.micro_batch_size, level, SMALL_LOSS_CHUNK)
        if smaller.needed_bytes < best.needed_bytes:
            best = min(best, search.least_work(smaller), key=search.work)
    return best


@dataclass(frozen=True)
class _Search:
    """Plans by level: how much is recomputed, one part of one layer after the other, MLPs first."""

    recipe: Recipe
    arch: Architecture
    workload_of: Callable[[Recipe], Workload]
    budget_bytes: int
    cuda: bool
    known: dict[tuple[int, int, int], Plan] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        """The level at which every layer is recomputed whole."""
        _, mlp = self.arch.recomputed
        return self.arch.layers * (1 if mlp is None else 2)

    def level(self, plan: Plan) -> int:
        """Where a plan stands between 0, nothing recomputed, and `levels`."""
        return plan.checkpointed_layers * (self.levels // max(1, self.arch.layers)) + plan.checkpointed_mlps

    def run(self, rows: int, level: int, loss_chunk: int) -> Plan:
        """What these settings take; each is forecast once."""
        if (rows, level, loss_chunk) in self.known:
            return self.known[rows, level, loss_chunk]
        layers = self.arch.layers
        whole, mlps = (
            (level, 0) if self.levels == layers else (max(0, level - layers), layers - abs(level - layers))
        )
        offload = self.recipe.training.activation_offloading and whole > 0
        wanted = Plan(rows, whole, mlps, layers, offload, loss_chunk, 0, self.budget_bytes)
        recipe = wanted.apply(self.recipe)
        found = forecast(recipe, self.workload_of(recipe), self.arch, cuda=self.cuda)
        self.known[rows, level, loss_chunk] = replace(wanted, needed_bytes=needed(found))
        return self.known[rows, level, loss_chunk]

    def least_work(self, least: Plan) -> Plan:
        """`least`, which fits, with as much spared as the budget allows."""
        layers = self.arch.layers
        for level in range(0, self.levels, max(1, layers)):
            most = self.run(least.micro_batch_size, level, least.loss_chunk)
            if most.needed_bytes <= self.budget_bytes:
                return most
            lower = least
            if level + layers < self.levels:
                lower = self.run(least.micro_batch_size, level + layers, least.loss_chunk)
            if lower.needed_bytes <= self.budget_bytes:
                return self._between(most, lower)
        return least

    def _between(self, most: Plan, least: Plan) -> Plan:
        """The lowest level that fits, of those between one that does not and one that does.

        Live bytes fall with the level, by about as much with each: it is read off a line, then proved by its
        neighbour, else searched for.
        """
        low, high = self.level(most), self.level(least)

        def fits(level: int) -> bool:
            return self.run(least.micro_batch_size, level, least.loss_chunk).needed_bytes <= self.budget_bytes

        per_level = max(1, (most.needed_bytes - least.needed_bytes) // (high - low))
        guess = min(low - (self.budget_bytes - most.needed_bytes) // per_level, high - 1)
        if guess > low and fits(guess):
            high = guess
            low = low if fits(guess - 1) else guess - 1
        elif guess > low:
            low = guess
            high = guess + 1 if fits(guess + 1) else high
        levels = range(low + 1, high + 1)
        level = levels[bisect_left(levels, True, key=fits)]
        return self.run(least.micro_batch_size, level, least.loss_chunk)

    def work(self, plan: Plan) -> tuple[float, int]:
        """Work of a step in tokens through all weights, and, among equals, the memory."""
        whole, mlp = self.arch.recomputed
        passes = 2 + (whole * plan.checkpointed_layers + (mlp or 0) * plan.checkpointed_mlps) / plan.layers
        batch = self.workload_of(plan.apply(self.recipe)).train
        tokens = batch.input_ids.shape[1] * self.recipe.training.global_batch_size
        micro_batches = self.recipe.training.global_batch_size / plan.micro_batch_size
        return passes * (tokens + DEQUANTIZATION_TOKENS * micro_batches), plan.needed_bytes


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
