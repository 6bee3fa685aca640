"""`qlora estimate`: the forecast of a recipe next to the rule of thumb, and advice on how to make it fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora import bundled
from qlora.data import Dataset, load_dataset, on_hub, remarks, training_batches
from qlora.errors import UsageError
from qlora.memory.account import account
from qlora.memory.advice import Advisor, Change
from qlora.memory.architecture import Architecture, architecture
from qlora.memory.budget import available_bytes, held_by_others, resolve_budget
from qlora.memory.forecast import Forecaster
from qlora.memory.plan import Plan, needed, plan, sized
from qlora.memory.workload import Workload, assumed, of_epoch, of_run
from qlora.model.checkpoint_notes import quantized_notes
from qlora.model.config_notes import config_notes
from qlora.model.gpu_notes import gpu_notes
from qlora.model.known_architectures import KNOWN_ARCHITECTURES
from qlora.model.precision import ENOUGH, Precision
from qlora.model.prepare import layer_notes
from qlora.model.tokens import tokenizer_of
from qlora.quantization.transformers_loader import overruled_settings
from qlora.recipe import Recipe
from qlora.recipe.sizes import Unit, unit_for
from qlora.runtime.device import device_of
from qlora.runtime.progress import Progress


@dataclass(frozen=True)
class Estimate:
    """Forecast memory of a recipe, and advice. Without a known capacity the advice is None or empty."""

    memory: dict[str, Any]
    """content of memory.json"""
    needed_bytes: int
    """without paged optimizer state, which can move to the host"""
    capacity_bytes: int | None
    """memory of the GPU that the run can use"""
    largest_micro_batch: int | None
    longest_rows: int | None
    changes: list[Change]
    plan: Plan | None
    precision: Precision
    """linear weights of the base that are in NF4, and the others"""
    overruled: list[str]
    """settings of the recipe that an NF4 checkpoint overrules with its own"""
    remarks: list[str]
    """see `qlora.data.remarks`; empty if the rows were not read"""
    held_bytes: int = 0
    """memory of this machine's GPU that other programs hold; not part of `capacity_bytes`"""
    notes: list[str] = field(default_factory=list)
    """remarks on the base's configuration, this machine's GPU and the layers, see `config_notes`, `gpu_notes` and
    `layer_notes` in `qlora.model`"""

    @property
    def fits(self) -> bool | None:
        """True if the run fits; None if the capacity is unknown."""
        return None if self.capacity_bytes is None else self.needed_bytes <= self.capacity_bytes

    def as_json(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        return {
            **self.memory,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "longest_rows": self.longest_rows,
            "changes": [change.as_json() for change in self.changes],
            "plan": None if self.plan is None else self.plan.settings,
            "linear_weights": {"nf4": self.precision.quantized, "not_quantized": dict(self.precision.kept)},
            "overruled": self.overruled,
        }

    def lines(self) -> Iterator[str]:
        """Yield the base's precision, the verdict and the advice as lines of text."""
        yield f"Base: {self.precision.line()}."
        yield from (f"{setting}." for setting in self.overruled)
        yield from (f"Data: {remark}." for remark in self.remarks)
        yield from (f"{note}." for note in self.notes)
        if self.plan is not None:
            yield self.plan.why
        if (host_bytes := self.memory["forecast"]["host_bytes"]) > 0:
            yield f"It also uses {unit_for(host_bytes).text(host_bytes)} of host memory, to save GPU memory."
        if self.capacity_bytes is None:
            yield "Pass --gpu 24GiB, or the memory of your GPU, to check whether it fits."
            return
        unit = unit_for(self.capacity_bytes)
        if self.held_bytes:
            held, left = unit.text(self.held_bytes), unit.text(self.capacity_bytes)
            yield f"Other programs use {held} of this GPU, which leaves {left}."
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
                f"About the largest micro-batch that fits: {self.largest_micro_batch} × {rows['row_tokens']:,} tokens, "
                f"or {rows['micro_batch_size']} × {self.longest_rows:,} tokens."
            )
            return
        paged = f", even with {unit.text(total - self.needed_bytes)} of optimizer state on the host"
        yield (
            f"Does not fit into {unit.text(self.capacity_bytes)}: {unit.text(-room)} too much"
            f"{paged if total > self.needed_bytes else ''}."
        )
        if not self.changes:
            yield f"No micro-batch, checkpointing, optimizer, rank or row length makes it fit. {self._way_out(unit)}"
            return
        yield (
            "Any one of these makes it fit, the cheapest first:"
            if len(self.changes) > 1
            else "This makes it fit:"
        )
        for change in self.changes:
            left = unit.text(self.capacity_bytes - change.needed_bytes)
            yield f"  {' '.join(change.settings)}  ({left} left)"

    def _way_out(self, unit: Unit) -> str:
        """Return what else can help, by what takes the memory."""
        dense_bytes = self.memory["forecast"]["parts"].get("base_unquantized", 0)
        if self.precision.share >= ENOUGH or 2 * dense_bytes < self.needed_bytes:
            return "Use a smaller model."
        return (
            f"{unit.text(dense_bytes)} are weights that are not quantized. Use a GPU with more memory, or a base whose "
            "weights are in linear layers, which NF4 quantizes."
        )


def estimate(recipe: Recipe, capacity_bytes: int | None = None, progress: Progress | None = None) -> Estimate:
    """Forecast the memory of a recipe, and whether it fits.

    Args:
        recipe: the recipe.
        capacity_bytes: memory of the GPU. If None: this machine's GPU, or the CPU if the recipe asks for it.
        progress: called with a line of text before each forecast.

    Raises:
        ModelError: the base has no usable architecture.
        DataError: a local data file cannot be used.
        UsageError: the memory budget is auto, but this machine has no GPU and `capacity_bytes` is None.

    >>> estimate(Recipe.load("llama-65b"), 48 * 2**30).fits
    """
    cuda = recipe.training.device != "cpu" or capacity_bytes is not None
    here = device_of(recipe) if cuda and torch.cuda.is_available() else torch.device("cpu")
    budget = recipe.training.memory
    if cuda and here.type == "cpu" and budget == "auto" and capacity_bytes is None:
        raise UsageError(
            "training.memory: auto uses the free memory of the GPU, and this machine has no GPU. Pass --gpu 24GiB, "
            "or the memory of your GPU"
        )
    budget_bytes = None if budget is None else resolve_budget(budget, here, capacity_bytes)
    held_bytes = 0
    if capacity_bytes is None and here.type == "cuda":
        capacity_bytes, held_bytes = available_bytes(here), held_by_others(here)
    recipe = from_config_alone(recipe)
    arch = architecture(recipe, cuda=cuda)
    dataset = _local_dataset(recipe)
    forecaster = Forecaster(arch, cuda=cuda)
    workload = assumed(recipe)
    chosen: Plan | None = None
    if budget_bytes is not None:
        chosen = plan(recipe, _for_plans(workload, dataset, arch), budget_bytes, forecaster, progress)
        recipe = chosen.apply(recipe)
        workload = sized(recipe, workload)
    if dataset is not None:
        workload = _of_run(recipe, dataset, arch)
    expected = forecaster.forecast(recipe, workload)
    rows: int | None = None
    tokens: int | None = None
    changes: list[Change] = []
    if capacity_bytes is not None:
        advisor = Advisor(recipe, workload, forecaster, capacity_bytes)
        if progress is not None:
            progress("searching for settings that fit")
        if needed(expected) <= capacity_bytes:
            rows = advisor.largest_micro_batch()
            tokens = advisor.longest_rows(rows)
        else:
            changes = advisor.changes()
    memory = account(recipe, workload, expected, cuda=cuda, capacity_bytes=capacity_bytes)
    return Estimate(
        memory, needed(expected), capacity_bytes, rows, tokens, changes, chosen, arch.precision,
        overruled_settings(recipe.base, arch.config), [] if dataset is None else remarks(dataset.counts),
        held_bytes, _notes(recipe, arch, here),
    )  # fmt: skip


def _notes(recipe: Recipe, arch: Architecture, device: torch.device) -> list[str]:
    """Return the remarks on the base and the device."""
    return [
        *config_notes(recipe, arch.config),
        *quantized_notes(recipe.base, arch.config),
        *gpu_notes(recipe, arch.config, device),
        *layer_notes(arch.model),
    ]


def from_config_alone(recipe: Recipe) -> Recipe:
    """Return the recipe with the bundled architecture in place of the hub's, if the package has one for its model."""
    known = KNOWN_ARCHITECTURES.get(recipe.base.model)
    if known is None:
        return recipe
    config = str(bundled.path(f"bundled/configs/{known}.json"))
    return recipe.model_copy(
        update={"base": recipe.base.model_copy(update={"model": config, "revision": None})}
    )


def hub_sources(recipe: Recipe) -> list[str]:
    """Return the sources of rows that are no files of this machine, and so data sets on the hub."""
    parts = [*recipe.data.parts, recipe.data.evaluation]
    return [part.source_name for part in parts if part and on_hub(part.source_name)]


def _local_dataset(recipe: Recipe) -> Dataset | None:
    """Load the recipe's data if it is local and has a tokenizer; return None otherwise: rows then count as full."""
    if hub_sources(recipe):
        return None
    if recipe.base.model.endswith(".json"):  # a config file has no tokenizer
        recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"init": "synthetic"})})
    if (tokenizer := _tokenizer(recipe)) is None:
        return None
    return load_dataset(recipe.data, tokenizer, recipe.training.seed)


def _for_plans(
    full_rows: Workload, dataset: Dataset | None, arch: Architecture
) -> Callable[[Recipe], Workload]:
    """Return a function from a recipe to the largest batches, the same that a run plans for."""
    if dataset is None:
        return lambda changed: sized(changed, full_rows)
    return lambda changed: of_epoch(changed, dataset, arch)


def _of_run(recipe: Recipe, dataset: Dataset, arch: Architecture) -> Workload:
    batches = training_batches(dataset, recipe)
    steps = recipe.training.total_steps(batches.steps_per_epoch)
    return of_run(recipe, dataset, batches, steps, arch)


def _tokenizer(recipe: Recipe) -> Any:
    from qlora.errors import ModelError

    try:
        return tokenizer_of(recipe)
    except ModelError:
        return None
