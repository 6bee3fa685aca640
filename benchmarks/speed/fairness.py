"""Nobody wins by not training: every contender must have computed the same losses, gradients and updates.

All start from the same numbers and take the same steps over the same documents, so at every step the loss and
the norm of the gradient are the same up to rounding, and so is, more loosely, how far A and B have moved. The
last step repeats the documents of the first: its loss must be lower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.speed.job import Answer


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference from the reference."""

    loss: float
    grad_norm: float
    adapter_change: float


TOLERANCES = {
    "float32": Tolerance(loss=5e-4, grad_norm=1e-2, adapter_change=0.1),
    # A and B in bfloat16 without a master copy round most of a small update
    "bfloat16": Tolerance(loss=5e-3, grad_norm=5e-2, adapter_change=0.5),
}


def reference(answers: Mapping[str, Sequence[Answer]]) -> Answer:
    """Each step's median over all contenders' first good answers: what most of them computed.

    Of two contenders, or when all fail, nobody can be called right: both then differ from their middle.
    """
    good = [answer for found in answers.values() if (answer := _first_good(found)) is not None]
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
    """What is wrong, by the contender's name; contenders without an entry trained as they should."""
    right = reference(answers)
    found: dict[str, str] = {}
    for name, given in answers.items():
        for answer in given:
            problem = answer.error or _difference(answer, right, TOLERANCES[dtype])
            if problem is not None:
                found.setdefault(name, problem)
    return found


def _difference(answer: Answer, right: Answer, tolerance: Tolerance) -> str | None:
    """The first thing in which an answer differs from the reference by more than the tolerance."""
    if len(answer.losses) != len(right.losses) or len(answer.grad_norms) != len(right.grad_norms):
        return f"took {len(answer.losses)} steps, not {len(right.losses)}"
    for step, (loss, expected) in enumerate(zip(answer.losses, right.losses, strict=True), 1):
        if not _close(loss, expected, tolerance.loss):
            return f"loss of step {step} is {loss:.5f}, most have {expected:.5f}"
    for step, (norm, expected) in enumerate(zip(answer.grad_norms, right.grad_norms, strict=True), 1):
        if norm <= 0 or not _close(norm, expected, tolerance.grad_norm):
            return f"gradient norm of step {step} is {norm:.5f}, most have {expected:.5f}"
    if not _close(answer.adapter_change, right.adapter_change, tolerance.adapter_change):
        return f"moved A and B by {answer.adapter_change:.4g}, most by {right.adapter_change:.4g}"
    if answer.losses[-1] >= answer.losses[0]:
        return f"learned nothing: loss {answer.losses[0]:.5f}, and {answer.losses[-1]:.5f} on the same tokens later"
    return None


def _close(value: float, expected: float, tolerance: float) -> bool:
    """Whether they differ by at most `tolerance` times `expected`; False for NaN."""
    return abs(value - expected) <= tolerance * abs(expected)


def _first_good(answers: Sequence[Answer]) -> Answer | None:
    return next((answer for answer in answers if answer.error is None), None)
