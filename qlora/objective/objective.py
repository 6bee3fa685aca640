"""Interface of the training objectives; causal language modelling implements it.

An objective is one file in this folder, its line in `objective_of`, and its test. The training step, the evaluation and
the memory forecast call the objective for the loss of a batch. A run prints and records the loss and its metrics.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from qlora.data import Batch


class Loss(NamedTuple):
    """Loss of one batch, as sums, so that K micro-batches equal one batch, whatever their lengths."""

    sum: Tensor
    """fp32 scalar on the device; the step divides it by the `weight` of all its batches"""
    metrics: Mapping[str, Tensor] = {}
    """sums of the objective's `metrics` (fp32 scalars without gradient)"""
    aux: Tensor | None = None
    """auxiliary loss of the batch, a mean over its tokens (fp32 scalar), without its coefficient; None if there is
    none. The step weights it by the tokens of the batch"""


class Objective(ABC):
    """A training objective."""

    metrics: ClassVar[tuple[str, ...]] = ()
    """names of the metrics in every `Loss`; they are divided by the same weight and recorded with the loss"""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of the batch; announce the computations after the decoder as the phase "loss"."""

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """Return the weight of the batch in the mean, such as its supervised tokens, without waiting for a GPU."""

    def aux_coefficient(self, model: nn.Module) -> float:
        """Return the coefficient of the auxiliary loss in the training of this model; 0 if it has none."""
        return 0.0
