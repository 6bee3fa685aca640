"""Fine-tuning, top to bottom: recipe, data, memory, base, adapter, optimizer, steps, result.

The order of the rows depends only on (seed, epoch), and LoRA's dropout of a row only on (seed, step, number of the row
in the step). A checkpoint therefore holds only tensors and counters, and a run that was killed and resumed takes
exactly the steps of a run that was not.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from qlora.adapter.methods import METHODS
from qlora.data import Batch, load_dataset, training_batches
from qlora.errors import DivergedError
from qlora.memory import measure
from qlora.memory.oom import out_of_memory_explained
from qlora.memory.plan import changed
from qlora.memory.run_memory import RunMemory, budgeted
from qlora.model.load import load_tokenizer
from qlora.model.prepare import build
from qlora.objective import objective_of
from qlora.objective.checks import check_model
from qlora.objective.step import accumulate
from qlora.optim import learning_rate
from qlora.recipe import Recipe
from qlora.runtime.allocators import keep_freed_memory
from qlora.runtime.distributed import DataParallel
from qlora.runtime.phases import Phase, announce
from qlora.runtime.signals import StopRequest
from qlora.storage import folders
from qlora.tracking import Tracker
from qlora.tracking.status import status
from qlora.training.evaluation import held_out_loss
from qlora.training.result import TrainResult
from qlora.training.run_folder import RunFolder, check_output, claim, earlier_plan, finished
from qlora.training.session import Session
from qlora.training.state import restore, save, write_memory, write_page, write_result


def train(recipe: Recipe, *, resume: bool = False, fresh: bool = False, terminal: bool = True) -> TrainResult:
    """Fine-tune with a recipe, until the last step or a signal, and return the outcome.

    Args:
        recipe: the settings, for example `Recipe.load("quickstart")`.
        resume: continue an existing run from its newest checkpoint, or start it if it has none.
        fresh: remove an existing run first.
        terminal: show progress on standard error.

    Raises:
        QloraError: contains a message for the user and the exit code; see `qlora.errors`.

    Examples:
        >>> outcome = train(Recipe.load("quickstart", ["training.max_steps=100"]))
        >>> outcome.loss_before, outcome.loss_after
    """
    processes = DataParallel.of(recipe)
    path = Path(recipe.output)
    check_output(recipe, path, resume=resume, fresh=fresh)
    with folders.lock(path) if processes.is_main else nullcontext():
        if resume and (summary := finished(path)) is not None:
            return TrainResult.from_json(summary, path / "result.json")
        with out_of_memory_explained(recipe):
            session = prepare(recipe, processes, earlier_plan(path) if resume else None, terminal=terminal)
            # An older run is replaced only now, after all input has been checked
            run = processes.from_main(
                lambda: claim(recipe, path, resume=resume, fresh=fresh, plan=session.plan)
            )
            return fit(session, run, terminal=terminal)


def prepare(
    recipe: Recipe,
    processes: DataParallel,
    plan: dict[str, Any] | None = None,
    *,
    terminal: bool = True,
    watch_all: bool = False,
) -> Session:
    """Load the data and the base, add the adapter, make the optimizer. Writes nothing into the run's folder.

    plan: memory settings of the run that is resumed. watch_all: measure memory in every step, not only in the largest.
    """
    device = processes.device
    tokenizer = load_tokenizer(recipe.base)
    dataset = load_dataset(recipe.data, tokenizer, recipe.training.seed)
    notes = []
    if recipe.training.memory is not None:
        if plan is None:
            with status("planning", wanted=terminal and processes.is_main) as progress:
                choice = processes.from_main(lambda: budgeted(recipe, dataset, device, progress))
            notes, plan = [choice.why], choice.settings
        recipe = changed(recipe, memory=None, **plan)
    batches = training_batches(dataset, recipe)
    steps = recipe.training.total_steps(batches.steps_per_epoch)
    memory = RunMemory.of(recipe, dataset, batches, steps, device)
    if device.type == "cpu":
        keep_freed_memory()
    model, optimizer = build(recipe, device)
    model = processes.shard(model)
    check_model(model, tokenizer, recipe)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # left from building the model, in pieces too small for a step
    notes += [*METHODS[recipe.adapter.method].notes(model), memory.note]
    memory = memory.with_watch(model, optimizer, every_step=watch_all)
    return Session(
        recipe, processes, tokenizer, dataset, batches, model, optimizer, objective_of(recipe), memory, plan, notes,
    )  # fmt: skip


def fit(session: Session, run: RunFolder, *, terminal: bool = True, trackers: bool = True) -> TrainResult:
    """Take steps, with evaluations and checkpoints on the way, until the last step or a signal."""
    training, total, began = session.recipe.training, session.total_steps, time.monotonic()
    progress = restore(session, run)
    tracker = session.tracker(run.path, progress.step, terminal=terminal, trackers=trackers)
    with StopRequest() as stop, tracker:
        for note in session.notes if terminal else ():
            tracker.note(note)
        latest_loss = progress.loss_before
        if progress.step == 0:
            latest_loss = progress.loss_before = held_out_loss(session, tracker, 0)
        while progress.step < total and stop.signal_number is None:
            progress.step = take_step(session, progress.step, tracker)
            last = progress.step == total
            if last or (training.eval_every and progress.step % training.eval_every == 0):
                latest_loss = held_out_loss(session, tracker, progress.step)
            if not last and training.save_every and progress.step % training.save_every == 0:
                save(session, run, progress, tracker)
        if progress.step < total:
            save(session, run, progress, tracker)

        result = write_result(session, run, tracker) if progress.step == total else None
        write_memory(session, run, tracker)
        outcome = TrainResult(
            run=run.path,
            result=result,
            steps=progress.step,
            total_steps=total,
            loss_before=progress.loss_before,
            loss_after=latest_loss,
            memory=measure.peak(session.processes.device),
            seconds=time.monotonic() - began,
            stopped_by=stop.signal_number if result is None else None,  # a finished run was not stopped
        )
        if result is not None and session.processes.is_main:
            run.write_result(outcome.as_json())
        tracker.finish(outcome.as_json())
    write_page(session, run)
    return outcome


def take_step(session: Session, step: int, tracker: Tracker) -> int:
    """Take optimizer step `step` (counted from 0) and record its metrics. Returns the number of steps taken."""
    settings, started = session.recipe.optimizer, time.perf_counter()
    batches = session.batches.step(step)
    lr = learning_rate(settings.schedule, settings.lr, step, session.total_steps, settings.warmup_steps)
    with session.memory.measuring(step):
        metrics = update(session, batches, step, lr)
    seconds = time.perf_counter() - started
    tokens = sum(batch.tokens for batch in batches)
    record = {
        "step": step + 1, "loss": metrics.pop("loss"), "lr": lr, **metrics, "tokens_per_second": tokens / seconds,
        "tokens": tokens, "supervised_tokens": sum(batch.supervised for batch in batches),
    }  # fmt: skip
    tracker.step(record)
    return step + 1


def update(session: Session, batches: list[Batch], step: int, lr: float) -> dict[str, float]:
    """Compute the gradients, clip them and update the weights. Returns loss, grad_norm (before clipping) and metrics.

    Raises:
        DivergedError: the loss or the norm is not finite. The weights are unchanged.
    """
    optimizer, processes, training = session.optimizer, session.processes, session.recipe.training
    optimizer.zero_grad()
    sums = accumulate(
        session.model, batches, session.objective, seed=training.seed, step=step, rank=processes.rank,
        processes=processes.count,
    )  # fmt: skip
    processes.reduce([*optimizer.gradients(), sums.sum, *sums.metrics.values()])
    with announce(Phase.UPDATE):
        norm = optimizer.clip(training.max_grad_norm)
    scalars = {"loss": sums.sum, "grad_norm": norm, **sums.metrics}
    # one transfer for all of them, so that a step waits for the device only once
    values = torch.stack([number.to(sums.sum) for number in scalars.values()]).tolist()
    metrics = dict(zip(scalars, values, strict=True))
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise DivergedError(
            f"step {step + 1}: the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}. No weight "
            f"was updated; checkpoints in {Path(session.recipe.output) / 'checkpoints'} are intact. Lower "
            "optimizer.lr, or check the rows of this step with `qlora data`"
        )
    with announce(Phase.UPDATE):
        optimizer.step(lr)
    return metrics
