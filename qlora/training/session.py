"""Everything that a run needs for its first step."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapter.identity import BaseIdentity
from qlora.adapter.methods import Course
from qlora.data import Batches, Dataset, prompt_digests
from qlora.memory.run_memory import RunMemory
from qlora.objective import Objective
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.runtime.distributed import DataParallel
from qlora.tracking import Tracker
from qlora.tracking.startup import Startup
from qlora.training.functions import Functions


@dataclass
class Session:
    """Model, data and settings of a run, as `train.prepare` made them from a recipe."""

    recipe: Recipe
    """with the settings that the memory budget chose"""
    processes: DataParallel
    tokenizer: Any
    dataset: Dataset
    batches: Batches
    model: nn.Module
    optimizer: Optimizer
    objective: Objective
    course: Course
    """what the adapter method does during the run"""
    memory: RunMemory
    plan: dict[str, Any] | None
    """settings of `training` that the memory budget chose; None without a budget"""
    notes: list[str]
    """messages for the user before the first step"""
    startup: Startup
    """shows the stages of the start, and measures them"""
    functions: Functions = field(default_factory=Functions)
    """functions of the caller"""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.training.total_steps(self.batches.steps_per_epoch)

    @property
    def result_name(self) -> str:
        """Name of the folder of trained weights in a run and in a checkpoint: `adapter` or `model`."""
        return "adapter" if self.recipe.adapter.facts.frozen_base else "model"

    @cached_property
    def base_identity(self) -> BaseIdentity:
        """Fingerprint of the base, the tokenizer and the template, stored with the adapter."""
        return replace(BaseIdentity.of(self.model), **prompt_digests(self.recipe.data, self.tokenizer))

    def tracker(
        self,
        run: Path,
        first_step: int,
        loss_before: float | None,
        *,
        evaluation_due: bool,
        terminal: bool,
        trackers: bool,
    ) -> Tracker:
        """Open the tracker of the run in folder `run`.

        Args:
            run: the run's folder.
            first_step: step of the checkpoint that the run resumes from; 0 for a new run.
            loss_before: held-out loss before the first step, if the run has computed it already.
            evaluation_due: the evaluation of that step is repeated.
            terminal: show progress on standard error.
            trackers: False leaves out the trackers of the recipe.
        """
        return Tracker(
            run,
            config=self.recipe.to_dict(),
            sections=dict(self.recipe.tracking) if trackers else {},
            total_steps=self.total_steps,
            resume_step=first_step,
            loss_before=loss_before,
            evaluation_due=evaluation_due,
            terminal=terminal,
            display=lambda: self.startup.display(run, self.total_steps, first_step, loss_before),
            main=self.processes.is_main,
        )
