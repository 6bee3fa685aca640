"""Save, restore and write out a run's state: trained weights, optimizer state and step."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora.adapter.algebra import plain
from qlora.adapter.config import CONFIG_FILE, read_fields
from qlora.data import Prompts
from qlora.data.prompt_files import write_prompt_files
from qlora.errors import DataError, ModelError, RecipeError, SaveError
from qlora.model.load import compute_dtype
from qlora.report import memory_files, page
from qlora.storage import folders, manifest
from qlora.tracking import Tracker
from qlora.training import checkpoint
from qlora.training.best import Best
from qlora.training.run_folder import RunFolder
from qlora.training.session import Session
from qlora.training.weights import read_weights, write_weights


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0
    """optimizer steps taken"""
    loss_before: float | None = None
    """held-out loss before the first step"""
    loss: float | None = None
    """held-out loss of the latest evaluation"""
    evaluated: int | None = None
    """step of the latest evaluation; None before the first one, or in a checkpoint of an earlier version"""
    seconds: float = 0.0
    """duration of the run so far, all sessions together"""
    record_sha256: str | None = None
    """of metrics.jsonl when the checkpoint was written; None without one, or in one of an earlier version"""
    evaluation_due: bool = False
    """a signal ended the evaluation after this step, so that a resumed run begins with it"""
    best: Best = field(default_factory=Best)
    """the best evaluation, by `training.best_by`"""
    metrics: dict[str, float] = field(default_factory=dict)
    """metrics of the latest evaluation"""
    failed_saves: int = 0
    """checkpoints in a row that could not be written"""


MOST_FAILED_SAVES = 3
"""failed checkpoints in a row that end a run: training on would only lose more"""


def save(session: Session, run: RunFolder, progress: Progress, tracker: Tracker) -> None:
    """Commit a checkpoint. If it cannot be written (a full disk), show a note and continue the run.

    Raises:
        SaveError: this is the third checkpoint in a row that could not be written, and the result is not due yet.
    """
    state = session.processes.gather(session.optimizer.state())
    if not session.processes.is_main:
        return
    record = tracker.sync_record()
    try:
        with checkpoint.writing(run.path, progress.step, run.run_id) as folder:
            write_weights(session, folder / session.result_name)
            checkpoint.save_tensors(folder / "optimizer.safetensors", state)
            if course := session.course.state():
                checkpoint.save_tensors(folder / "course.safetensors", course)
            checkpoint.write_state(
                folder,
                {
                    "step": progress.step,
                    "total_steps": session.total_steps,
                    "loss_before": progress.loss_before,
                    "loss": progress.loss,
                    "evaluated": progress.evaluated,
                    "seconds": progress.seconds,
                    "evaluation_due": progress.evaluation_due,
                    "best": asdict(progress.best),
                    "metrics": progress.metrics,
                    "data": session.dataset.fingerprint,
                    "metrics_sha256": record,
                    "compute_dtype": _dtype(session),
                    "plan": session.plan,  # for a resume after run.json was lost
                },
            )
    except SaveError as error:
        progress.failed_saves += 1
        if progress.failed_saves >= MOST_FAILED_SAVES and progress.step < session.total_steps:
            raise SaveError(
                f"{MOST_FAILED_SAVES} checkpoints in a row could not be saved, so the run ends at step "
                f"{progress.step}: {error}. {_saved_until(run, session.result_name)}"
            ) from error
        tracker.note(f"checkpoint of step {progress.step} not saved: {error}")
        return
    progress.failed_saves = 0
    try:
        checkpoint.rotate(run.path, session.recipe.training.keep_checkpoints, run.run_id)
    except SaveError as error:
        tracker.note(f"checkpoint of step {progress.step} saved, but an older one is not removed: {error}")


def _saved_until(run: RunFolder, name: str) -> str:
    """Return a sentence on where the run can continue once the disk is in order."""
    with suppress(ModelError):  # every checkpoint is damaged
        newest = checkpoint.newest(run.path, run_id=run.run_id, checksums=False, report=lambda line: None)
        if newest is not None:
            return f"Mend that, and continue from {newest} with --resume: its weights are in {newest.name}/{name}"
    return "There is no whole checkpoint; mend that, and start again with --fresh"


def restore(session: Session, run: RunFolder) -> Progress:
    """Load the newest whole checkpoint of the run, if there is one, into model and optimizer.

    Raises:
        RecipeError: the run would go on in another dtype.
        DataError: the data set has changed since the checkpoint, so the run cannot be resumed exactly.
        ModelError: the base has changed since the checkpoint, a file is missing, or every checkpoint is damaged.
    """
    folder = checkpoint.newest(run.path, run_id=run.run_id)
    if folder is None:
        return Progress()
    state = checkpoint.read_state(folder)
    if state["data"] != session.dataset.fingerprint:
        raise DataError(
            f"{folder}: the data set has changed since this checkpoint (its rows, tokenizer or template), so the "
            "run cannot be resumed exactly. Restore the data, or start again with --fresh"
        )
    before, now = state.get("compute_dtype"), _dtype(session)
    if before not in (None, now):
        raise RecipeError(
            f"base.compute_dtype: this run began in {before} and would go on in {now}, because `auto` depends on the "
            f"machine. Resume it with base.compute_dtype={before}, or start again with --fresh"
        )
    read_weights(session, folder / session.result_name)
    session.optimizer.load_state(checkpoint.load_tensors(folder / "optimizer.safetensors"))
    if session.course.state():
        session.course.load_state(checkpoint.load_tensors(folder / "course.safetensors"))
    return Progress(
        state["step"],
        state["loss_before"],
        state.get("loss", state["loss_before"]),
        state.get("evaluated"),
        state.get("seconds", 0.0),
        state.get("metrics_sha256"),
        state.get("evaluation_due", False),
        Best(**state.get("best", {})),
        state.get("metrics", {}),
    )


def _dtype(session: Session) -> str:
    """Return the dtype in which the run computes, such as float32."""
    return str(compute_dtype(session.recipe.base, session.processes.device)).removeprefix("torch.")


def write_result(session: Session, run: RunFolder, step: int, tracker: Tracker) -> Path:
    """Write the trained weights, tokenizer and template to <run>/adapter or <run>/model, and return that folder.

    step: the step of these weights.
    """
    result = run.path / session.result_name
    if session.processes.is_main:
        try:
            with folders.replacing(run.path, session.result_name) as folder:
                write_weights(session, folder)
                session.tokenizer.save_pretrained(folder)
                write_prompt_files(
                    folder, Prompts(session.recipe.data, session.tokenizer, session.dataset.shared_system)
                )
                manifest.write(folder, run_id=run.run_id, step=step, data=session.dataset.fingerprint)
        except SaveError as error:
            raise SaveError(
                f"the result is not saved: {error}. {_saved_until(run, session.result_name)}"
            ) from error
        if (result / CONFIG_FILE).is_file() and (
            note := plain.note(read_fields(result / CONFIG_FILE), run.path)
        ):
            tracker.note(note)
    return result


def write_memory(session: Session, run: RunFolder, tracker: Tracker) -> None:
    """Write the memory report (rule of thumb, forecast, measurement) into the run's folder."""
    content = session.memory.content(run.path) if session.processes.is_main else None
    if content is None:
        return
    try:
        memory_files.write(run.path, content)
    except SaveError as error:
        tracker.note(f"memory report not written: {error}")
    else:
        tracker.memory(content, run.path / "memory.png")


def write_page(session: Session, run: RunFolder) -> None:
    """Write report.html. A failure is ignored, because `qlora report` can write the page later."""
    if session.processes.is_main:
        with suppress(SaveError):
            page.write_page(run.path)
