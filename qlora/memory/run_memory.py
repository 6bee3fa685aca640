"""The memory of one run: forecast before it starts, watched while it goes, written into its folder."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qlora.data import Batches, Dataset
from qlora.errors import QloraError
from qlora.memory import measure
from qlora.memory.account import account
from qlora.memory.architecture import architecture
from qlora.memory.budget import resolve_budget
from qlora.memory.forecast import Forecast, Forecaster, forecast
from qlora.memory.plan import Plan, Progress, needed, plan
from qlora.memory.workload import Workload, of_epoch, of_run
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.recipe.sizes import unit_for


@dataclass(frozen=True)
class RunMemory:
    """What a run is forecast to take. `forecast` is None where the architecture defies one; `note` says why."""

    recipe: Recipe
    workload: Workload
    device: torch.device
    forecast: Forecast | None
    note: str
    watch: measure.Watch | None = None

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset, batches: Batches, steps: int, device: torch.device) -> Self:
        """Forecast a run of `steps` steps. Never fails: a run does not depend on being forecast."""
        cuda = device.type == "cuda"
        workload = None
        try:
            arch = architecture(recipe, cuda=cuda)
            workload = of_run(recipe, dataset, batches, steps, arch)
            found = forecast(recipe, workload, arch, cuda=cuda)
        except QloraError:
            raise  # a recipe's mistake, which the run would find too
        except Exception as error:  # noqa: BLE001 - architectures of others fail in their own ways
            workload = workload or of_run(recipe, dataset, batches, steps, None)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return cls(recipe, workload, device, None, f"no memory forecast for this architecture: {reason}")
        return cls(recipe, workload, device, found, _told(found, device))

    def watched(self, model: nn.Module, optimizer: Optimizer, every_step: bool = False) -> "RunMemory":
        """With a watch over the steps that have the run's largest micro-batches, or over all."""
        largest = {self.workload.step, self.workload.densest_step}

        def wanted(step: int) -> bool:
            return every_step or step in largest

        return replace(self, watch=measure.Watch(model, optimizer, self.device, wanted))

    def over(self, step: int, *, evaluation: bool = False) -> AbstractContextManager[None]:
        """Around step number `step`, or around the evaluation before it."""
        return nullcontext() if self.watch is None else self.watch.over(step, evaluation=evaluation)

    def account(self) -> dict[str, Any] | None:
        """memory.json's content; None without a forecast."""
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
        """The account for the memory.json of the run in `folder`; None without a forecast.

        A resumed run that no longer comes by the watched step keeps what was measured before.
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
    """How to run the recipe within its budget, `training.memory`; `progress` hears what is tried.

    Raises:
        OutOfMemoryError: nothing fits.
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


def _told(found: Forecast, device: torch.device) -> str:
    """The forecast in one line."""
    phase, parts = found.trace.peak()
    total, paged = sum(parts.values()), parts["optimizer_state_paged"]
    unit = unit_for(total)
    line = f"memory forecast {unit.text(total)}, the most in {phase}"
    if paged:
        line += f"; {unit.text(paged)} of it may move to the host"
    if found.host_bytes:
        line += f"; and {unit.text(found.host_bytes)} of the host"
        free = measure.free_bytes(torch.device("cpu"))
        if found.host_bytes > free:
            line += f", which has {unit.text(free)} free: leave out training.activation_offloading or base.embedding"
    capacity = measure.capacity_bytes(device)
    if capacity is not None and needed(found) > capacity:
        line += (
            f". This GPU has {unit.text(capacity)}: it will not fit. "
            "`qlora estimate` names changes that would, training.memory=auto makes some of them"
        )
    return line


def _measured_before(folder: Path) -> dict[str, Any] | None:
    """What an earlier part of the same run measured."""
    file = folder / "memory.json"
    return json.loads(file.read_text())["measured"] if file.is_file() else None
