"""Course of a run: what an adapter method does at each step, apart from the layers.

Most methods do nothing. AdaLoRA adds a penalty to the loss, and moves its budget of ranks after every step.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Course:
    """A course that does nothing."""

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss once in a step, a scalar with gradient; None for nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Change the model after the optimizer's update `step`, counted from 0. The gradients are those of the step."""

    def finish(self) -> None:
        """Change the model once after the last step, before it is evaluated and saved."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores, so that a resumed run continues exactly."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state from `state`."""
        assert not state, "this method stores no state"

    def outcome(self) -> dict[str, Any]:
        """Return what the method found during the run, as plain values for result.json."""
        return {}
