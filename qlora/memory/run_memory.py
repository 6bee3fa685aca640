"""Memory of one run: forecast before it starts, measured during the run, written into its folder."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qlora.adapter.methods import Course
from qlora.data import Batches, Dataset
from qlora.memory import measure
from qlora.memory.account import account
from qlora.memory.architecture import architecture
from qlora.memory.budget import available_bytes, held_by_others, resolve_budget
from qlora.memory.forecast import Forecast, Forecaster, forecast
from qlora.memory.no_forecast import NoForecastError, failure_named
from qlora.memory.plan import Plan, needed, plan
from qlora.memory.workload import Workload, of_epoch, of_run
from qlora.model.precision import Precision
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.recipe.sizes import unit_for
from qlora.runtime.progress import Progress

PHASES = {
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "update": "the optimizer step",
    "evaluation": "an evaluation",
}
"""phases of a step in words"""


@dataclass(frozen=True)
class RunMemory:
    """Forecast and measurement of a run.

    If the architecture cannot be forecast, `forecast` is None and `note` has the reason.
    """

    recipe: Recipe
    workload: Workload
    device: torch.device
    forecast: Forecast | None
    note: str
    watch: measure.Watch | None = None
    precision: Precision | None = None
    """share of the base's linear weights in 4 bits; None without a forecast"""

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset, batches: Batches, steps: int, device: torch.device) -> Self:
        """Forecast a run of `steps` steps. A failed forecast does not stop the run.

        Raises:
            QloraError: the recipe has an error that would also stop the run.
        """
        cuda = device.type == "cuda"
        workload = None
        try:
            with failure_named(recipe.base.model):
                arch = architecture(recipe, cuda=cuda)
                workload = of_run(recipe, dataset, batches, steps, arch)
                made = forecast(recipe, workload, arch, cuda=cuda)
        except NoForecastError as error:
            workload = workload or of_run(recipe, dataset, batches, steps, None)
            return cls(recipe, workload, device, None, str(error))
        return cls(recipe, workload, device, made, _summary(made, device), precision=arch.precision)

    def with_watch(
        self, model: nn.Module, optimizer: Optimizer, course: Course, every_step: bool = False
    ) -> "RunMemory":
        """Return a copy that measures the steps with the run's largest micro-batches, or every step."""
        largest = {self.workload.step, self.workload.densest_step}

        def wanted(step: int) -> bool:
            return every_step or step in largest

        return replace(self, watch=measure.Watch(model, optimizer, course, self.device, wanted))

    def measuring(self, step: int, *, evaluation: bool = False) -> AbstractContextManager[None]:
        """Return a context for step number `step`, or for the evaluation before it, that measures it if wanted."""
        return nullcontext() if self.watch is None else self.watch.measuring(step, evaluation=evaluation)

    def account(self) -> dict[str, Any] | None:
        """Return the content of memory.json; None without a forecast."""
        if self.forecast is None:
            return None
        return account(
            self.recipe,
            self.workload,
            self.forecast,
            cuda=self.device.type == "cuda",
            capacity_bytes=measure.capacity_bytes(self.device),
            measured=None if self.watch is None else self.watch.measured(),
        )

    def content(self, folder: Path) -> Mapping[str, Any] | None:
        """Return the content of memory.json for the run in `folder`; None without a forecast.

        If this session measured no step, as after a resume, the earlier measurement in the folder is kept.
        """
        content = self.account()
        if content is None:
            return None
        if content["measured"] is None:
            content["measured"] = _measured_before(folder)
        return content


def budgeted(
    recipe: Recipe, dataset: Dataset, device: torch.device, progress: Progress | None = None
) -> Plan:
    """Plan the recipe for its budget, `training.memory`.

    Args:
        recipe: a recipe with `training.memory`.
        dataset: its data.
        device: the device of the run.
        progress: called with a line of text before each forecast.

    Raises:
        OutOfMemoryError: no settings fit.
    """
    assert recipe.training.memory is not None
    cuda = device.type == "cuda"
    arch = architecture(recipe, cuda=cuda)
    budget_bytes = resolve_budget(recipe.training.memory, device)
    return plan(
        recipe,
        lambda changed: of_epoch(changed, dataset, arch),
        budget_bytes,
        Forecaster(arch, cuda=cuda),
        progress,
    )


def _summary(forecast: Forecast, device: torch.device) -> str:
    """Return the forecast in one line."""
    phase, parts = forecast.trace.peak()
    total, paged = sum(parts.values()), parts["optimizer_state_paged"]
    unit = unit_for(total)
    line = f"{unit.text(total)} forecast, at the peak in {PHASES.get(phase, phase)}"
    if paged:
        line += f"; {unit.text(paged)} of it can move to the host"
    if forecast.host_bytes:
        line += f"; also {unit.text(forecast.host_bytes)} of host memory"
        free = measure.free_bytes(torch.device("cpu"))
        if forecast.host_bytes > free:
            line += f", but only {unit.text(free)} is free: remove training.activation_offloading or base.embedding"
    capacity = measure.capacity_bytes(device)
    if capacity is None:
        return line
    free, held = available_bytes(device), held_by_others(device)
    if needed(forecast) > free:
        others = f", and other programs use {unit.text(held)}" if held else ""
        line += (
            f". THE RUN WILL NOT FIT: this GPU has {unit.text(capacity)}{others}. Run `qlora estimate` for changes "
            "that make it fit, or set training.memory=auto"
        )
    return line


def _measured_before(folder: Path) -> dict[str, Any] | None:
    """Return the measurement of an earlier session of the same run."""
    file = folder / "memory.json"
    return json.loads(file.read_text())["measured"] if file.is_file() else None
