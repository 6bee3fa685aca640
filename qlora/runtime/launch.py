"""Variables with which torchrun and accelerate launch say how many processes run a command, and which one this is."""

import os

from qlora.errors import UsageError

ADVICE = (
    "Start all processes with torchrun or accelerate launch, or unset RANK, LOCAL_RANK and WORLD_SIZE for a run of one "
    "process"
)


def process_count() -> int:
    """Return the number of processes of the run.

    Raises:
        UsageError: a variable is no whole number, or the number of this process is none of the run's.
    """
    count, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    _number("LOCAL_RANK", 0)  # accelerate reads it
    if count < 1:
        raise UsageError(f"WORLD_SIZE is {count}, and a run has at least one process. {ADVICE}")
    if rank >= count > 1:
        raise UsageError(
            f"RANK is {rank}, and the {count} processes of WORLD_SIZE have ranks from 0. {ADVICE}"
        )
    return count


def is_main() -> bool:
    """Return True if this process prints: the run's only one, or its first. Raises UsageError as `process_count`."""
    return process_count() == 1 or _number("RANK", 0) <= 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}, not a whole number. {ADVICE}") from None
