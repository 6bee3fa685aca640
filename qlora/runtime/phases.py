"""Names that the code announces while it runs: a profiler shows them, `memory.live` books live bytes by them."""

from enum import StrEnum

from torch.profiler import record_function


class Phase(StrEnum):
    """The phases of a training step, in order; memory.json names them so."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"
    EVALUATION = "evaluation"


class Allocation(StrEnum):
    """Allocations that are counted apart from the others of their phase."""

    DEQUANTIZATION = "dequantization"
    HOST = "host memory"
    """A forecast cannot tell it from a GPU's otherwise: its tensors are all fake CPU tensors."""


def announce(what: Phase | Allocation) -> record_function:
    """A context within which `what` goes on: `with announce(Phase.UPDATE): optimizer.step(lr)`."""
    return record_function(what.value)
