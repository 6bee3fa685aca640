"""What an objective is: the seam that causal language modelling comes through.

An objective is one file in this folder, its line in `objective_of`, and its test. The step, the evaluation and the
memory forecast ask the objective for the loss of a batch; a run prints, records and resumes whatever it returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from qlora.data import Batch


class Loss(NamedTuple):
    """Of one batch: sums, so that K micro-batches equal one batch, whatever their lengths."""

    sum: Tensor
    """fp32 scalar on the device, to be divided by the `weight` of all batches of the step"""
    metrics: Mapping[str, Tensor] = {}
    """the sums that the objective names (fp32 scalars, no gradient)"""


class Objective(ABC):
    """What is learned from a batch."""

    metrics: ClassVar[tuple[str, ...]] = ()
    """other sums that every loss has, divided by the same weight and recorded beside it"""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The batch's loss, announcing the part that follows the decoder as the phase "loss"."""

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """What the batch counts for in the mean: its supervised tokens, say, or its pairs. Known on the host."""
