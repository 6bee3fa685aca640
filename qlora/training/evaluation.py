"""Evaluation during a run: the loss on held-out rows, and sample answers to their prompts."""

from collections.abc import Callable

from qlora.data import held_out_batches
from qlora.inference.generate import answer
from qlora.memory import measure
from qlora.objective.step import evaluate
from qlora.runtime.signals import EvaluationStopped, StopRequest
from qlora.tracking import Sample, Tracker
from qlora.training.session import Session


def held_out_loss(session: Session, tracker: Tracker, step: int, stop: StopRequest) -> float | None:
    """Compute and record the mean held-out loss (nats per supervised token) and sample answers after `step` steps.

    Returns None without held-out rows.

    Raises:
        EvaluationStopped: a signal came before a batch, or while the main process answered. Nothing is recorded.
    """
    processes = session.processes

    def stop_early() -> None:
        if stop.agreed(processes.highest):
            raise EvaluationStopped

    if not session.dataset.held_out:
        return None
    with session.memory.measuring(step, evaluation=True):
        sums, weight = evaluate(
            session.model,
            held_out_batches(session.dataset, session.recipe),
            session.objective,
            rank=processes.rank,
            processes=processes.count,
            before_each=stop_early,
        )
    processes.reduce([sums.sum, *sums.metrics.values()])
    loss = sums.sum.item() / weight
    samples = answers(session, lambda: stop.signal_number is not None) if processes.is_main else []
    stop_early()
    if processes.is_main:
        peak = measure.peak(processes.device)
        peak_bytes = peak.resident_bytes if peak.allocated_bytes is None else peak.allocated_bytes
        metrics = {f"eval_{name}": metric.item() / weight for name, metric in sums.metrics.items()}
        tracker.evaluation(
            {
                "step": step,
                "eval_loss": loss,
                "eval_tokens": weight,
                **metrics,
                "peak_memory_bytes": peak_bytes,
            }
        )
        tracker.samples(samples, step)
    return loss


def answers(session: Session, stopped: Callable[[], bool]) -> list[Sample]:
    """Answer the first few held-out prompts with the current model. `stopped`, asked after each token, ends them."""
    training = session.recipe.training
    return [
        Sample(
            before=prompt.before,
            prompt=prompt.text,
            reference=prompt.reference,
            answer=answer(
                session.model,
                session.tokenizer,
                prompt.input_ids,
                training.sample_tokens,
                stop_ids=session.dataset.stop_ids,
                stopped=stopped,
            ),
        )
        for prompt in session.dataset.prompts[: training.samples]
        if not stopped()
    ]
