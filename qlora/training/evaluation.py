"""Evaluation during a run: the loss on held-out rows, sample answers to their prompts, and the caller's metrics."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from qlora.data import Prompts, held_out_batches
from qlora.inference.generate import answer
from qlora.memory import measure
from qlora.objective.step import evaluate
from qlora.runtime.signals import EvaluationStopped, StopRequest
from qlora.tracking import Sample, Tracker
from qlora.training.functions import HeldOut, HeldOutExample
from qlora.training.session import Session


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one evaluation."""

    loss: float
    """mean held-out loss, in nats per supervised token"""
    metrics: dict[str, float] = field(default_factory=dict)
    """numbers of the objective and of the caller's functions by name"""


def evaluate_held_out(session: Session, tracker: Tracker, step: int, stop: StopRequest) -> Evaluation | None:
    """Compute and record the held-out loss, the metrics and sample answers after `step` steps.

    Returns None without held-out rows.

    Raises:
        EvaluationStopped: a signal came before a batch, or while the main process answered. Nothing is recorded.
        QloraError: a metric of the caller failed. Nothing is recorded.
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
    metrics = {name: metric.item() / weight for name, metric in sums.metrics.items()}
    # Every process needs the numbers, because all of them must agree on the best weights
    metrics |= processes.from_main(lambda: _own_metrics(session, step, loss, stop))
    samples = answers(session, lambda: stop.requested) if processes.is_main else []
    stop_early()
    if processes.is_main:
        peak = measure.peak(processes.device)
        peak_bytes = peak.resident_bytes if peak.allocated_bytes is None else peak.allocated_bytes
        tracker.evaluation(
            {
                "step": step,
                "eval_loss": loss,
                "eval_tokens": weight,
                **{f"eval_{name}": number for name, number in metrics.items()},
                "peak_memory_bytes": peak_bytes,
            }
        )
        tracker.samples(samples, step)
    return Evaluation(loss, metrics)


def _own_metrics(session: Session, step: int, loss: float, stop: StopRequest) -> dict[str, float]:
    """Return the numbers of the caller's functions; none if a signal came, after which all processes stop."""
    if not session.functions.metrics:
        return {}

    @cache
    def prompts() -> Prompts:
        return Prompts(session.recipe.data, session.tokenizer, session.dataset.shared_system)

    held_out = HeldOut(
        step=step, loss=loss, examples=_examples(session), model=session.model,
        tokenizer=copy.deepcopy(session.tokenizer), prompts=prompts, stop_ids=session.dataset.stop_ids,
        stopped=lambda: stop.requested,
    )  # fmt: skip
    training, known = session.recipe.training, session.objective.metrics
    try:
        found = session.functions.evaluate(held_out, known, training.seed)
    except EvaluationStopped:
        return {}
    training.follows.check_computed([*known, *found])
    return found


def _examples(session: Session) -> tuple[HeldOutExample, ...]:
    return tuple(
        HeldOutExample(prompt.text, prompt.reference, prompt.before, prompt.origin, tuple(prompt.input_ids))
        for prompt in session.dataset.prompts
    )


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
