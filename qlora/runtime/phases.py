"""Labels of the running code, for profilers and for the memory accounting of `memory.live`."""

from enum import StrEnum

from torch.profiler import record_function


class Phase(StrEnum):
    """Phases of a training step, in order; also keys of memory.json."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"
    EVALUATION = "evaluation"


class Allocation(StrEnum):
    """Allocations that are counted separately from the rest of their phase."""

    DEQUANTIZATION = "dequantization"
    HOST = "host memory"
    """needed by forecasts, in which host and GPU tensors are both fake CPU tensors"""


def announce(what: Phase | Allocation) -> record_function:
    """Return a context that labels the code within: `with announce(Phase.UPDATE): optimizer.step(lr)`."""
    return record_function(what.value)
