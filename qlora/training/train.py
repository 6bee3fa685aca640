"""Fine-tuning, top to bottom: recipe, data, memory, base, adapter, optimizer, steps, result.

The order of the rows depends only on (seed, epoch), and LoRA's dropout of a row only on (seed, step, number of the row
in the step). A checkpoint therefore holds only tensors and counters, and a run that was killed and resumed takes
exactly the steps of a run that was not.
"""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.gradient_reach import without_gradient
from qlora.data import Batch
from qlora.errors import DivergedError, listed
from qlora.formats import Row
from qlora.memory import measure
from qlora.memory.oom import out_of_memory_explained
from qlora.objective import objective_of
from qlora.objective.step import accumulate
from qlora.optim import learning_rate
from qlora.recipe import Recipe
from qlora.report.live import LossPicture
from qlora.runtime.distributed import DataParallel
from qlora.runtime.phases import Phase, announce
from qlora.runtime.signals import BY_FUNCTION, EvaluationStopped, StopRequest
from qlora.storage import folders
from qlora.tracking import Tracker
from qlora.tracking.notebook import NotebookStartup, in_notebook
from qlora.tracking.startup import Startup, silent
from qlora.tracking.wandb_names import check_names
from qlora.training import best, disk_space
from qlora.training.evaluation import evaluate_held_out
from qlora.training.facts import facts_of
from qlora.training.functions import Functions, Metric, OnStep
from qlora.training.prepare import prepare
from qlora.training.result import TrainResult
from qlora.training.resuming import already_finished, earlier, is_longer, nothing_to_resume, resume_point
from qlora.training.run_folder import RunFolder, check_output, claim, finished, recorded
from qlora.training.session import Session
from qlora.training.state import Progress, restore, save, write_memory, write_page, write_result


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    fresh: bool = False,
    terminal: bool = True,
    startup: Startup | None = None,
    rows: Iterable[Row] | None = None,
    metrics: Metric | Sequence[Metric] | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Fine-tune with a recipe, until the last step or a signal, and return the outcome.

    Args:
        recipe: the settings, for example `Recipe.load("quickstart")`.
        resume: continue an existing run from its newest checkpoint, or start it if it has none.
        fresh: remove an existing run first.
        terminal: show progress on standard error, or in a Jupyter notebook in one output that is updated.
        startup: shows the stages before the first step; None: as `terminal` says.
        rows: rows in memory, as dictionaries, in place of those of `data.source`, which is then only their name. A
            resumed run needs the same rows again.
        metrics: a function or several, which the main process calls at each evaluation of the held-out rows with a
            `qlora.training.functions.HeldOut`; it returns finite numbers by name, which are recorded beside the loss.
        on_step: called after each step with its record, read-only; returns True to save a checkpoint and stop.

    Raises:
        QloraError: contains a message for the user and the exit code; see `qlora.errors`.

    Examples:
        >>> outcome = train(Recipe.load("quickstart", ["training.max_steps=100"]))
        >>> outcome.loss_before, outcome.loss_after
    """
    functions = Functions(metrics, on_step)
    processes = DataParallel.of(recipe)
    startup = (startup or _startup(shown=terminal)) if processes.is_main else silent()
    path = Path(recipe.output)
    notes = check_names(recipe.tracking.wandb, path, resume=resume)
    check_output(recipe, path, resume=resume, fresh=fresh)
    with folders.lock(path) if processes.is_main else nullcontext():
        outcome = _outcome(path) if resume else None
        reopened = outcome is not None and is_longer(recipe, outcome, recorded(path / "recipe.yaml"))
        if outcome is not None and not reopened:
            startup.warn(already_finished(recipe, path, outcome.steps, recorded(path / "recipe.yaml")))
            return outcome
        processes.from_main(lambda: functions.check(recipe, objective_of(recipe).metrics))
        with out_of_memory_explained(recipe):
            plan, start = earlier(path) if resume else (None, None)
            session = prepare(recipe, processes, plan, startup=startup, rows=rows, start=start)
            session.functions, session.notes = functions, [*notes, *session.notes]
            point = resume_point(recipe, path, session.total_steps) if resume else None
            if resume and point is None and processes.is_main:
                startup.warn(nothing_to_resume(path))
            if processes.is_main:
                disk_space.check(session, path)
            # An older run is replaced only now, after all input has been checked
            run = processes.from_main(
                lambda: claim(recipe, path, resume=resume, fresh=fresh, plan=session.plan)
            )
            if reopened and processes.is_main:
                run.reopen()
            return fit(session, run, point.total_steps if point else None, terminal=terminal)


def _outcome(path: Path) -> TrainResult | None:
    """Return the outcome of the run in `path` if it is finished, else None."""
    summary = finished(path)
    return None if summary is None else TrainResult.from_json(summary, path / "result.json")


def _startup(*, shown: bool) -> Startup:
    """Return the start's display: in a notebook an output of the cell, else lines on standard error."""
    return NotebookStartup(LossPicture) if shown and in_notebook() else Startup(shown=shown)


def fit(
    session: Session,
    run: RunFolder,
    length_before: int | None = None,
    *,
    terminal: bool = True,
    trackers: bool = True,
) -> TrainResult:
    """Take steps, with evaluations and checkpoints on the way, until the last step or a signal.

    length_before: total steps of the resumed run before this session.
    """
    progress = restore(session, run)
    began = time.monotonic() - progress.seconds  # of the sessions before
    facts = facts_of(session, progress.step, length_before)
    if session.processes.is_main:
        run.write_facts(facts.as_json())
    session.startup.table(facts.header())
    tracker = session.tracker(
        run.path, progress.step, progress.loss_before, evaluation_due=progress.evaluation_due, terminal=terminal,
        trackers=trackers,
    )  # fmt: skip
    with StopRequest() as stop, tracker:
        tracker.check_record(progress.record_sha256, progress.step)
        if note := session.functions.without(progress.metrics, session.objective.metrics):
            tracker.note(note)
        progress.best = best.check(session, run, progress.best, tracker)
        take_steps(session, run, tracker, progress, stop, began)
        session.functions.raise_failure(session.processes)
        if _stopped_by(stop) == "on_step" and progress.step < session.total_steps:
            tracker.note(
                f"on_step ends the run at step {progress.step} of {session.total_steps}; resume=True goes on"
            )
        result = finish(session, run, progress, tracker)
        write_memory(session, run, tracker)
        outcome = TrainResult(
            run=run.path,
            result=result,
            steps=progress.step,
            total_steps=session.total_steps,
            loss_before=progress.loss_before,
            loss_after=progress.loss,
            memory=measure.peak(session.processes.device),
            seconds=time.monotonic() - began,
            stopped_by=_stopped_by(stop) if result is None else None,  # a finished run was not stopped
            facts=facts.as_json(),
            result_step=progress.evaluated if result is not None else None,
            adapter=session.course.outcome(),
            metrics=progress.metrics,
        )
        if result is not None and session.processes.is_main:
            run.write_result(outcome.as_json())
        tracker.finish(outcome.as_json())
    write_page(session, run)
    return outcome


def take_steps(
    session: Session, run: RunFolder, tracker: Tracker, progress: Progress, stop: StopRequest, began: float
) -> None:
    """Take steps until the last one, a signal, the caller's word, or the end of the patience; save a checkpoint there.

    began: time of the clock at which the run would have begun without interruptions.
    """
    training, total = session.recipe.training, session.total_steps
    # AdaLoRA's end cuts ranks away, after which no optimizer fits: its last checkpoint is that of the moment before
    changed_at_the_end = session.recipe.adapter.facts.plans_its_length
    if progress.step == total:
        session.course.finish()
    if progress.evaluation_due or (progress.step in (0, total) and progress.evaluated != progress.step):
        evaluate(session, run, tracker, progress, stop)
    while progress.step < total and not progress.best.exhausted(training) and not ended(session, stop):
        progress.step = take_step(session, progress.step, tracker)
        if last := progress.step == total:
            if changed_at_the_end:
                progress.evaluation_due, progress.seconds = True, time.monotonic() - began
                save(session, run, progress, tracker)
            session.course.finish()
        if last or (training.eval_every and progress.step % training.eval_every == 0):
            evaluate(session, run, tracker, progress, stop)
        progress.seconds = time.monotonic() - began
        if not last and training.save_every and progress.step % training.save_every == 0:
            save(session, run, progress, tracker)
    # Also of the last step, so that a finished run can be lengthened
    if not (changed_at_the_end and progress.step == total):
        save(session, run, progress, tracker)


def ended(session: Session, stop: StopRequest) -> bool:
    """Return True if a signal, or a function of the caller, ends the run; all processes agree."""
    if session.functions.end_run:
        stop.by_function()
    return stop.agreed(session.processes.highest)


def _stopped_by(stop: StopRequest) -> int | str | None:
    return "on_step" if stop.signal_number == BY_FUNCTION else stop.signal_number


def evaluate(
    session: Session, run: RunFolder, tracker: Tracker, progress: Progress, stop: StopRequest
) -> None:
    """Note the numbers of an evaluation in `progress`; if a signal or a failing metric ends it, it stays due."""
    progress.evaluation_due = True
    with suppress(EvaluationStopped), session.functions.failure_kept():
        found = evaluate_held_out(session, tracker, progress.step, stop)
        progress.loss, progress.metrics = (None, {}) if found is None else (found.loss, found.metrics)
        if found is not None:
            progress.best = best.compare(session, run, progress.best, found, progress.step, tracker)
        progress.evaluation_due, progress.evaluated = False, progress.step
        progress.loss_before = progress.loss_before if progress.step else progress.loss


def finish(session: Session, run: RunFolder, progress: Progress, tracker: Tracker) -> Path | None:
    """Write the result if the run has ended: after its last step, or because its loss no longer falls; else None."""
    training, early = session.recipe.training, progress.step < session.total_steps
    follows = training.follows
    if progress.evaluation_due or (early and not progress.best.exhausted(training)):
        return None
    if early:
        tracker.note(
            f"no {follows.improved} in {progress.best.since} evaluations, so the run ends at step {progress.step} "
            f"(training.patience={training.patience})"
        )
    if training.result == "best" and progress.best.step != progress.step:
        best.load(session, run, progress.best)
        tracker.note(f"the result is that of step {progress.best.step}, which has the {follows.best}")
        progress.loss, progress.evaluated = progress.best.loss, progress.best.step
        progress.metrics = progress.best.metrics
    return write_result(session, run, progress.evaluated or 0, tracker)


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
    if session.processes.is_main:
        session.functions.after_step(record)
    if step == 0 and (names := without_gradient(session.model)):
        tracker.note(
            f"no gradient reached {listed(names)} in the first step. If the model computes its loss without them, they "
            "learn nothing"
        )
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
        processes=processes.count, penalty=session.course.penalty,
    )  # fmt: skip
    more = dict(sums.metrics) if sums.aux is None else {"aux_loss": sums.aux, **sums.metrics}
    processes.reduce([*optimizer.gradients(), sums.sum, *more.values()])
    with announce(Phase.UPDATE):
        norm = optimizer.clip(training.max_grad_norm)
    scalars = {"loss": sums.sum, "grad_norm": norm, **more}
    # one transfer for all of them, so that a step waits for the device only once
    values = torch.stack([number.to(sums.sum) for number in scalars.values()]).tolist()
    metrics = dict(zip(scalars, values, strict=True))
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise DivergedError(
            f"step {step + 1}: the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}. "
            + _why_diverged(session)
        )
    with announce(Phase.UPDATE):
        optimizer.step(lr)
        session.course.after_step(step)
    return metrics


def _why_diverged(session: Session) -> str:
    """Return what is known about a loss or gradient that is not finite, with the way out."""
    checkpoints = Path(session.recipe.output) / "checkpoints"
    for name, parameter in trainable_parameters(session.model).items():
        if not parameter.isfinite().all():
            return (
                f"{name} is not finite since an earlier update, and so may be the newest checkpoints in {checkpoints}. "
                "Lower optimizer.lr, and start again with --fresh"
            )
    return (
        f"No weight was updated; checkpoints in {checkpoints} are intact. Lower optimizer.lr, or check the rows of "
        "this step with `qlora data`"
    )
