"""`qlora estimate`: the forecast of a recipe beside the documents' estimates, and what would fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qlora import bundled
from qlora.data import load_dataset, training_batches
from qlora.memory import measure
from qlora.memory.account import account
from qlora.memory.advice import Advisor, Change
from qlora.memory.architecture import Architecture, architecture
from qlora.memory.forecast import forecast
from qlora.memory.plan import Plan, changed, needed, plan, sized
from qlora.memory.workload import Workload, assumed, of_run
from qlora.model.load import KNOWN_ARCHITECTURES, load_tokenizer
from qlora.recipe import Recipe
from qlora.recipe.rules import LOCAL_FILE
from qlora.recipe.sizes import parse_size, unit_for


@dataclass(frozen=True)
class Estimate:
    """What a recipe will take. The rest is None or empty where no capacity is known."""

    memory: dict[str, Any]
    """as memory.json"""
    needed_bytes: int
    """without paged optimizer state, which may move to the host"""
    capacity_bytes: int | None
    largest_micro_batch: int | None
    longest_rows: int | None
    changes: list[Change]
    plan: Plan | None

    @property
    def fits(self) -> bool | None:
        """None where no capacity is known."""
        return None if self.capacity_bytes is None else self.needed_bytes <= self.capacity_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.memory,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "longest_rows": self.longest_rows,
            "changes": [change.as_json() for change in self.changes],
            "plan": None if self.plan is None else self.plan.settings,
        }

    def lines(self) -> Iterator[str]:
        """The verdict, for people."""
        if self.plan is not None:
            yield self.plan.why
        if (host_bytes := self.memory["forecast"]["host_bytes"]) > 0:
            yield f"Besides, it takes {unit_for(host_bytes).text(host_bytes)} of the host's memory, to spare the GPU."
        if self.capacity_bytes is None:
            yield "Whether it fits: --gpu 24GiB, or the size of yours, tells."
            return
        unit = unit_for(self.capacity_bytes)
        room = self.capacity_bytes - self.needed_bytes
        total = self.memory["forecast"]["total_bytes"]
        if self.fits:
            yield f"Fits into {unit.text(self.capacity_bytes)}: " + (
                f"{unit.text(self.capacity_bytes - total)} are left."
                if total <= self.capacity_bytes
                else f"{unit.text(total - self.capacity_bytes)} of paged optimizer state stay on the host."
            )
            rows = self.memory["workload"]
            yield (
                f"The most that fits: micro-batches of {self.largest_micro_batch} rows of {rows['row_tokens']} "
                f"tokens, or rows of {self.longest_rows:,} tokens in micro-batches of {rows['micro_batch_size']}."
            )
            return
        yield f"Does not fit into {unit.text(self.capacity_bytes)}: {unit.text(-room)} too much."
        if not self.changes:
            yield "No micro-batch, checkpointing, optimizer, rank or row length makes it fit: take a smaller model."
            return
        yield "It would with any of these, the cheapest first:" if len(self.changes) > 1 else "It would with:"
        for change in self.changes:
            left = unit.text(self.capacity_bytes - change.needed_bytes)
            yield f"  {' '.join(change.settings)}  ({left} left)"


def estimate(recipe: Recipe, capacity_bytes: int | None = None) -> Estimate:
    """Forecast a recipe on a GPU of `capacity_bytes`, or on the one here; on the CPU if the recipe says so.

    Raises:
        ModelError: there is no such architecture. DataError: a local data file cannot be used.

    >>> estimate(Recipe.load("llama-65b"), 48 * 2**30).fits
    """
    cuda = recipe.training.device != "cpu" or capacity_bytes is not None
    if capacity_bytes is None and cuda and torch.cuda.is_available():
        capacity_bytes = measure.capacity_bytes(torch.device("cuda"))
    recipe = _from_config_alone(recipe)
    arch = architecture(recipe, cuda=cuda)
    workload = _workload(recipe, arch)
    found: Plan | None = None
    if recipe.training.memory is not None:
        recipe, found = _planned(recipe, workload, arch, capacity_bytes, cuda)
        workload = sized(recipe, workload)
    foreseen = forecast(recipe, workload, arch, cuda=cuda)
    rows = tokens = None
    changes: list[Change] = []
    if capacity_bytes is not None:
        advisor = Advisor(recipe, workload, arch, capacity_bytes, cuda)
        if needed(foreseen) <= capacity_bytes:
            rows, tokens = advisor.largest_micro_batch(), advisor.longest_rows()
        else:
            changes = advisor.changes()
    memory = account(recipe, workload, foreseen, cuda=cuda, capacity_bytes=capacity_bytes)
    return Estimate(memory, needed(foreseen), capacity_bytes, rows, tokens, changes, found)


def _planned(
    recipe: Recipe, workload: Workload, arch: Architecture, capacity_bytes: int | None, cuda: bool
) -> tuple[Recipe, Plan]:
    """The recipe as its budget lets it run; `auto` is the GPU in question."""
    budget = recipe.training.memory
    assert budget is not None
    auto = capacity_bytes or measure.free_bytes(torch.device("cpu"))
    limit = auto if budget == "auto" else parse_size(budget)
    found = plan(recipe, arch, lambda changed: sized(changed, workload), limit, cuda=cuda)
    return found.apply(recipe), found


def _from_config_alone(recipe: Recipe) -> Recipe:
    """The recipe with an architecture that comes with the package in the place of the hub's, if it is one."""
    known = KNOWN_ARCHITECTURES.get(recipe.base.model)
    if known is None:
        return recipe
    config = str(bundled.path(f"bundled/configs/{known}.json"))
    return recipe.model_copy(
        update={"base": recipe.base.model_copy(update={"model": config, "revision": None})}
    )


def _workload(recipe: Recipe, arch: Architecture) -> Workload:
    """The largest batches of local data; of other data, full rows."""
    source = recipe.data.source
    held_out = recipe.data.held_out
    local = LOCAL_FILE.fullmatch(source) and not (
        isinstance(held_out, str) and not LOCAL_FILE.fullmatch(held_out)
    )
    if not local:
        return assumed(recipe)
    base = recipe.base
    if base.model.endswith(".json"):  # a config alone has no tokenizer
        base = base.model_copy(update={"init": "synthetic"})
    if (tokenizer := _tokenizer(base)) is None:
        return assumed(recipe)
    dataset = load_dataset(recipe.data, tokenizer, recipe.training.seed)
    plain = changed(recipe, memory=None)
    batches = training_batches(dataset, plain)
    steps = recipe.training.total_steps(batches.steps_per_epoch)
    return of_run(plain, dataset, batches, steps, arch)


def _tokenizer(base: Any) -> Any:
    from qlora.errors import ModelError

    try:
        return load_tokenizer(base)
    except ModelError:
        return None
