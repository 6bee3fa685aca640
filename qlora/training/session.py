"""Everything a run works with, ready for its first step."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapter.identity import BaseIdentity
from qlora.data import Batches, Dataset, prompting
from qlora.memory.run_memory import RunMemory
from qlora.objective import Objective
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.runtime.distributed import DataParallel
from qlora.tracking import Tracker


@dataclass
class Session:
    """What `prepare` has made of a recipe."""

    recipe: Recipe
    """with the settings that a memory budget came to"""
    processes: DataParallel
    tokenizer: Any
    dataset: Dataset
    batches: Batches
    model: nn.Module
    optimizer: Optimizer
    objective: Objective
    memory: RunMemory
    plan: dict[str, Any] | None
    """what a memory budget came to: settings of `training`"""
    notes: list[str]
    """what the user should know before the first step"""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.training.total_steps(self.batches.steps_per_epoch)

    @property
    def result_name(self) -> str:
        """`adapter` or `model`: the folder's name in a run and in a checkpoint."""
        return "adapter" if self.recipe.adapter.facts.frozen_base else "model"

    @cached_property
    def base_identity(self) -> BaseIdentity:
        """What an adapter is trained on, for it to remember."""
        return replace(BaseIdentity.of(self.model), **prompting(self.recipe.data, self.tokenizer))

    def tracker(self, run: Path, first_step: int, *, terminal: bool, trackers: bool) -> Tracker:
        """Where the numbers of the run in the folder `run` go; `trackers`: to those of the recipe too."""
        return Tracker(
            run,
            config=self.recipe.to_dict(),
            sections=dict(self.recipe.tracking) if trackers else {},
            total_steps=self.total_steps,
            resume_step=first_step,
            terminal=terminal,
            main=self.processes.is_main,
        )
