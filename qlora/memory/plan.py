"""A budget instead of knobs: the fastest way to run a recipe that is forecast to fit into so much memory.

With a frozen base an optimizer step is two passes of matrix products over the tokens, forward and input
gradients, and a third for every layer that is recomputed. What free memory can hold is therefore not recomputed:
checkpointing all layers costs up to half as much again. Each pass also dequantizes every weight once, however few
the tokens, which speaks for large micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora.errors import OutOfMemoryError
from qlora.memory.forecast import Architecture, Forecast, forecast
from qlora.memory.size import unit_for
from qlora.memory.workload import Workload, resized
from qlora.recipe import Recipe

DEQUANTIZATION_TOKENS = 300
"""tokens whose products cost as much as dequantizing the weights once: on an H100 2.5 bytes a weight at 3 TB/s
against 2 FLOP at 790 TFLOP/s; a CPU is not far from it"""

SMALL_LOSS_CHUNK = 256


@dataclass(frozen=True)
class Plan:
    """Settings that fit, and what they are forecast to take."""

    micro_batch_size: int
    checkpointed_layers: int
    layers: int
    loss_chunk: int
    needed_bytes: int
    budget_bytes: int

    @property
    def settings(self) -> dict[str, int]:
        """The plan as keys of the recipe's section `training`."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "gradient_checkpointing": self.checkpointed_layers,
            "loss_chunk": self.loss_chunk,
        }

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these settings, and without a budget."""
        return changed(recipe, memory=None, **self.settings)

    @property
    def why(self) -> str:
        """The plan in one line."""
        recomputed = {0: "no layer", self.layers: f"all {self.layers} layers"}.get(
            self.checkpointed_layers, f"{self.checkpointed_layers} of {self.layers} layers"
        )
        unit = unit_for(self.budget_bytes)
        return (
            f"plan for {unit.text(self.budget_bytes)}: micro_batch_size={self.micro_batch_size}, "
            f"gradient_checkpointing={self.checkpointed_layers} ({recomputed} recomputed), "
            f"loss_chunk={self.loss_chunk}; forecast {unit.text(self.needed_bytes)}"
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
        recipe: its global batch stays; micro-batch, checkpointing and loss chunk are chosen.
        workload_of: the largest batches of a recipe's run, for its micro-batch size.
        budget_bytes: of a GPU, paged optimizer state not counted, for it may leave.

    Raises:
        OutOfMemoryError: one row at a time with everything recomputed does not fit; says how much it takes.
    """
    search = _Search(recipe, arch, workload_of, budget_bytes, cuda)
    fitting: list[Plan] = []
    total = recipe.training.global_batch_size
    for rows in (rows for rows in range(1, total + 1) if total % rows == 0):
        least = search.run(rows, arch.layers, recipe.training.loss_chunk)
        if least.needed_bytes > budget_bytes:
            break
        fitting.append(least)
    if not fitting:
        fitting = [search.run(1, arch.layers, SMALL_LOSS_CHUNK)]
        if fitting[0].needed_bytes > budget_bytes:
            unit = unit_for(budget_bytes)
            raise OutOfMemoryError(
                f"training.memory: one row at a time, every layer recomputed, is forecast to take "
                f"{unit.text(fitting[0].needed_bytes)} of {unit.text(budget_bytes)}. `qlora estimate` with "
                "--gpu tells what else could be changed"
            )
    best = search.fewest_checkpointed(fitting.pop())
    for least in reversed(fitting):
        if search.work(replace(least, checkpointed_layers=0)) < search.work(best):
            best = min(best, search.fewest_checkpointed(least), key=search.work)
    if best.checkpointed_layers and best.loss_chunk > SMALL_LOSS_CHUNK:
        # Smaller pieces of logits may make room for another layer
        smaller = search.fewest_checkpointed(search.run(best.micro_batch_size, arch.layers, SMALL_LOSS_CHUNK))
        best = min(best, smaller, key=search.work)
    return best


@dataclass(frozen=True)
class _Search:
    recipe: Recipe
    arch: Architecture
    workload_of: Callable[[Recipe], Workload]
    budget_bytes: int
    cuda: bool

    def run(self, rows: int, checkpointed: int, loss_chunk: int) -> Plan:
        """What these settings take."""
        wanted = Plan(rows, checkpointed, self.arch.layers, loss_chunk, 0, self.budget_bytes)
        recipe = wanted.apply(self.recipe)
        found = forecast(recipe, self.workload_of(recipe), self.arch, cuda=self.cuda)
        return Plan(rows, checkpointed, self.arch.layers, loss_chunk, needed(found), self.budget_bytes)

    def fewest_checkpointed(self, least: Plan) -> Plan:
        """`least`, which fits with all layers checkpointed, with as many spared as the budget allows.

        Live bytes fall by as much with every layer that is checkpointed, so the number is read off a line and
        then proved.
        """
        most = self.run(least.micro_batch_size, 0, least.loss_chunk)
        if most.needed_bytes <= self.budget_bytes:
            return most
        per_layer = max(1, (most.needed_bytes - least.needed_bytes) // self.arch.layers)
        count = min(self.arch.layers, -((self.budget_bytes - most.needed_bytes) // per_layer))
        while count < self.arch.layers:
            found = self.run(least.micro_batch_size, count, least.loss_chunk)
            if found.needed_bytes <= self.budget_bytes:
                return found
            count += max(1, (found.needed_bytes - self.budget_bytes) // per_layer)
        return least

    def work(self, plan: Plan) -> tuple[float, int]:
        """Work of a step in tokens through all weights, and, among equals, the memory."""
        passes = 2 + plan.checkpointed_layers / plan.layers
        batch = self.workload_of(plan.apply(self.recipe)).train
        tokens = batch.input_ids.shape[1] * self.recipe.training.global_batch_size
        micro_batches = self.recipe.training.global_batch_size / plan.micro_batch_size
        return passes * (tokens + DEQUANTIZATION_TOKENS * micro_batches), plan.needed_bytes


def needed(found: Forecast) -> int:
    """Bytes of the device that a run cannot do without: paged optimizer state may move to the host."""
    _, parts = found.trace.peak()
    return sum(parts.values()) - parts["optimizer_state_paged"]


def changed(recipe: Recipe, **training: object) -> Recipe:
    """The recipe with other `training` settings."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


def sized(recipe: Recipe, workload: Workload) -> Workload:
    """`workload` with the recipe's micro-batch size, and rows no longer than it allows."""
    tokens = min(workload.train.input_ids.shape[1], recipe.data.max_length)
    return resized(workload, rows=recipe.training.micro_batch_size, tokens=tokens)
