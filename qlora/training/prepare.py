"""Preparation of a run: data, memory plan and forecast, base, adapter and optimizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora.adapter.initial import InitialValues
from qlora.adapter.methods import METHODS
from qlora.data import Dataset, load_dataset, training_batches
from qlora.errors import DataError, ModelError, RecipeError
from qlora.formats import Row
from qlora.kernels import compiled_for
from qlora.memory.plan import changed
from qlora.memory.run_memory import RunMemory, budgeted
from qlora.model.checkpoint_notes import checkpoint_notes
from qlora.model.config_notes import config_notes
from qlora.model.gpu_notes import gpu_notes
from qlora.model.load import load_config
from qlora.model.prepare import build, continue_adapter, model_notes
from qlora.model.progress import download, is_on_hub, tensors_counted
from qlora.model.tokens import TrainedTokens
from qlora.objective import objective_of
from qlora.objective.checks import check_model
from qlora.optim import Optimizer
from qlora.quantization.transformers_loader import overruled_settings
from qlora.recipe import Recipe
from qlora.runtime.allocators import keep_freed_memory
from qlora.runtime.distributed import DataParallel
from qlora.runtime.progress import Progress
from qlora.tracking.startup import Startup, silent
from qlora.training.session import Session


def prepare(
    recipe: Recipe,
    processes: DataParallel,
    plan: dict[str, Any] | None = None,
    *,
    startup: Startup | None = None,
    watch_all: bool = False,
    rows: Iterable[Row] | None = None,
    start: Path | None = None,
) -> Session:
    """Load the data and the base, add the adapter, make the optimizer. Writes nothing into the run's folder.

    Args:
        recipe: the recipe.
        processes: the processes of the run.
        plan: memory settings of the run that is resumed.
        startup: shows the stages; None shows nothing.
        watch_all: measure memory in every step, not only in the largest.
        rows: rows in memory, as in `load_dataset`.
        start: an adapter of the run that is resumed, which has its initial values.

    Raises:
        QloraError: as `train`.
    """
    device, startup = processes.device, startup or silent()
    continued = recipe.adapter.start_from
    if start is not None and continued is not None:
        recipe = _from(
            recipe, str(start)
        )  # whose layers are the same, also if the folder of `adapter.from` is gone
    with startup.stage("reading the data") as progress:
        tokenizer, dataset = _read(recipe, rows, progress)
    _check_same_rows(processes, dataset)
    config = load_config(recipe.base)
    notes = _notes(recipe, config, device)
    if recipe.training.memory is not None:
        if plan is None:
            with startup.stage("planning memory") as progress:
                choice = processes.from_main(lambda: budgeted(recipe, dataset, device, progress))
            notes, plan = [*notes, choice.why], choice.settings
        recipe = changed(recipe, memory=None, **plan)
    batches = training_batches(dataset, recipe)
    steps = recipe.training.total_steps(batches.steps_per_epoch)
    check_warmup(recipe, steps)
    with startup.stage("forecasting memory"):
        memory = RunMemory.of(recipe, dataset, batches, steps, device)
    if device.type == "cpu":
        keep_freed_memory()
    model, optimizer, found = _build(recipe, processes, tokenizer, startup, start)
    notes += [*found, *checkpoint_notes(recipe.base, config)]
    _check_same_start(processes, model)
    with startup.stage(f"{_compiling(device)}checking the model"):
        _check_model(model, tokenizer, recipe, device)
    method = METHODS[recipe.adapter.method]
    course = method.course(model, recipe.adapter, steps)
    memory = memory.with_watch(model, optimizer, course, every_step=watch_all)
    own = [] if continued else method.notes(model)  # they describe the start of a new adapter
    return Session(
        _from(recipe, continued), processes, tokenizer, dataset, batches, model, optimizer, objective_of(recipe),
        course, memory, plan, [*notes, *own, *model_notes(model, tokenizer, recipe)], startup,
    )  # fmt: skip


def _from(recipe: Recipe, folder: str | None) -> Recipe:
    """Return the recipe with another folder in `adapter.from`."""
    adapter = recipe.adapter.model_copy(update={"start_from": folder})
    return recipe.model_copy(update={"adapter": adapter})


def _notes(recipe: Recipe, config: Any, device: torch.device) -> list[str]:
    """Return the remarks on the recipe that follow from the base's configuration and the device alone."""
    overruled = overruled_settings(recipe.base, config)
    return [*overruled, *config_notes(recipe, config), *gpu_notes(recipe, config, device)]


def _read(
    recipe: Recipe, rows: Iterable[Row] | None, progress: Progress
) -> tuple[PreTrainedTokenizerFast, Dataset]:
    """Load the tokenizer, with the tokens that the recipe trains, and the rows, which must have the named ones."""
    tokens = TrainedTokens.of(recipe)
    seed = recipe.training.seed
    dataset = load_dataset(recipe.data, tokens.tokenizer, seed, rows=rows, progress=progress)
    tokens.check_rows(dataset.train)
    return tokens.tokenizer, dataset


def _build(
    recipe: Recipe, processes: DataParallel, tokenizer: Any, startup: Startup, start: Path | None
) -> tuple[Any, Optimizer, list[str]]:
    """Load the base and add the adapter, a new one or one that goes on; return remarks on that too."""
    if is_on_hub(recipe.base):
        with startup.stage(f"downloading {recipe.base.model}", own_bars=True):
            download(recipe.base)
    with startup.stage("loading the base") as progress, tensors_counted(progress):
        model, optimizer = build(recipe, processes.device, start=start)
        # The checkpoint of a resumed run is read later, with the optimizer's state
        notes = continue_adapter(model, recipe, tokenizer) if start is None else []
        return processes.shard(model), optimizer, notes


def _compiling(device: torch.device) -> str:
    """Return the start of the name of the first stage that launches kernels: it takes seconds on a GPU."""
    return "compiling kernels, " if compiled_for(device) else ""


def _check_model(model: Any, tokenizer: Any, recipe: Recipe, device: torch.device) -> None:
    """Run `check_model`, the first work of the model; on a GPU, then free what building the model left behind."""
    check_model(model, tokenizer, recipe)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # in pieces too small for a step


def _check_same_rows(processes: DataParallel, dataset: Dataset) -> None:
    """Raise DataError if the processes of a run have read different rows."""
    if processes.from_main(lambda: dataset.fingerprint) != dataset.fingerprint:
        raise DataError(
            "the processes of this run read different rows, so they would train on different data. Give all of them "
            "the same files"
        )


def _check_same_start(processes: DataParallel, model: nn.Module) -> None:
    """Raise ModelError if the processes of a run took different initial values from the base."""
    values = InitialValues.of(model)
    own = None if values is None else values.digest
    if processes.from_main(lambda: own) != own:
        raise ModelError(
            "adapter.init: the processes of this run decompose the same weights with different last bits, so they "
            "would train different adapters. Use GPUs of one kind, or another init"
        )


def check_warmup(recipe: Recipe, steps: int) -> None:
    """Check that a run of `steps` steps is longer than its warm-up; a run of `epochs` knows its steps only now.

    Raises:
        RecipeError: the learning rate would never reach `optimizer.lr`.
    """
    warmup = recipe.optimizer.warmup_steps
    if warmup and warmup >= steps:
        raise RecipeError(
            f"optimizer.warmup_steps: warmup_steps ({warmup}) must be below the {steps} steps of this run "
            f"({recipe.training.epochs} epochs), or the learning rate never reaches lr. Set optimizer.warmup_steps=0, "
            "or take more steps"
        )
