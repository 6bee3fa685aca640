"""Learning rate as a pure function of the step, so a checkpoint stores no scheduler state."""

import math


def learning_rate(schedule: str, lr: float, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the learning rate of update `step` (0-based) of `total_steps`.

    Warm-up rises linearly and reaches `lr` at its last step. Then `constant` keeps `lr`; `linear` and `cosine` fall
    towards zero, which they would reach at step `total_steps`. No update therefore has a rate of zero.

    Raises:
        ValueError: The schedule is none of these three.
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
    raise ValueError(f"unknown schedule {schedule!r}; use constant, linear or cosine")
