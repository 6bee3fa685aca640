"""The learning rate as a function of the step, so that a checkpoint has nothing of it to save."""

import math


def learning_rate(schedule: str, lr: float, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Learning rate of update `step` (0-based) of `total_steps`.

    Warm-up rises linearly and reaches `lr` at its last step; then `constant` stays, `linear` and `cosine`
    fall towards zero, which they would reach at step `total_steps`: no update is spent on a rate of zero.

    Raises:
        ValueError: another schedule.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match schedule:
        case "constant":
            return lr
        case "linear":
            return lr * (1.0 - progress)
        case "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; known: constant, linear, cosine")
