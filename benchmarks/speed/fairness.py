"""Checks that every contender trained: all must compute the same losses, gradients and updates.

All start from the same values and take the same steps over the same documents. At every step, loss and gradient norm
must therefore be equal up to rounding, and so must, with a larger tolerance, the total change of A and B. The last step
repeats the documents of the first: its loss must be lower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.speed.job import Answer


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference from the reference for each quantity."""

    loss: float
    grad_norm: float
    adapter_change: float


TOLERANCES = {
    "float32": Tolerance(loss=5e-4, grad_norm=1e-2, adapter_change=0.1),
    # Without a master copy, A and B in bfloat16 lose most of a small update to rounding
    "bfloat16": Tolerance(loss=5e-3, grad_norm=5e-2, adapter_change=0.5),
}


def reference(answers: Mapping[str, Sequence[Answer]]) -> Answer:
    """Return each step's median over the first good answers of all contenders.

    Two contenders have no majority: if they disagree, both can differ from their median by more than the tolerance.
    If all fail, the reference is empty.
    """
    good = [answer for given in answers.values() if (answer := _first_good(given)) is not None]
    steps = max((len(answer.losses) for answer in good), default=0)
    good = [answer for answer in good if len(answer.losses) == len(answer.grad_norms) == steps]
    if not good:
        return Answer()
    return Answer(
        losses=[median(values) for values in zip(*(a.losses for a in good), strict=True)],
        grad_norms=[median(values) for values in zip(*(a.grad_norms for a in good), strict=True)],
        adapter_change=median(a.adapter_change for a in good),
    )


def problems(answers: Mapping[str, Sequence[Answer]], dtype: str) -> dict[str, str]:
    """Return the problem of each contender that failed or trained differently, by name."""
    right = reference(answers)
    wrong: dict[str, str] = {}
    for name, given in answers.items():
        for answer in given:
            problem = answer.error or _difference(answer, right, TOLERANCES[dtype])
            if problem is not None:
                wrong.setdefault(name, problem)
    return wrong


def _difference(answer: Answer, right: Answer, tolerance: Tolerance) -> str | None:
    """Describe the first difference from the reference above the tolerance; None if there is none."""
    if len(answer.losses) != len(right.losses) or len(answer.grad_norms) != len(right.grad_norms):
        return f"took {len(answer.losses)} steps, not {len(right.losses)}"
    for step, (loss, expected) in enumerate(zip(answer.losses, right.losses, strict=True), 1):
        if not _close(loss, expected, tolerance.loss):
            return f"loss of step {step} is {loss:.5f}, the median is {expected:.5f}"
    for step, (norm, expected) in enumerate(zip(answer.grad_norms, right.grad_norms, strict=True), 1):
        if norm <= 0 or not _close(norm, expected, tolerance.grad_norm):
            return f"gradient norm of step {step} is {norm:.5f}, the median is {expected:.5f}"
    if not _close(answer.adapter_change, right.adapter_change, tolerance.adapter_change):
        return f"moved A and B by {answer.adapter_change:.4g}, the median is {right.adapter_change:.4g}"
    if answer.losses[-1] >= answer.losses[0]:
        return (
            f"learned nothing: loss {answer.losses[0]:.5f}, later {answer.losses[-1]:.5f} on the same tokens"
        )
    return None


def _close(value: float, expected: float, tolerance: float) -> bool:
    """Return True if the values differ by at most `tolerance` times `expected`; False for NaN."""
    return abs(value - expected) <= tolerance * abs(expected)


def _first_good(answers: Sequence[Answer]) -> Answer | None:
    return next((answer for answer in answers if answer.error is None), None)
