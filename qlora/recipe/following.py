"""The number that the best weights and the patience of a run follow: `training.best_by`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from qlora.errors import FunctionError, RecipeError, listed

METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
"""names that a metric can have"""

FollowedNumber = Annotated[str, Field(pattern=rf"^(lowest|highest) {METRIC_NAME.pattern}$")]
"""direction and name of a number"""

LOSS = "loss"
"""name of the held-out loss, which every evaluation has"""


@dataclass(frozen=True)
class Following:
    """A number of each evaluation, and the direction in which it is better."""

    name: str
    higher: bool

    @classmethod
    def of(cls, text: str) -> "Following":
        """Read `lowest NAME` or `highest NAME`."""
        direction, _, name = text.partition(" ")
        return cls(name, direction == "highest")

    def value(self, loss: float, metrics: Mapping[str, float]) -> float:
        """Return the number of an evaluation with this held-out loss and these metrics."""
        return loss if self.name == LOSS else metrics[self.name]

    def better(self, value: float, before: float) -> bool:
        """Return True if a value is better than an earlier one."""
        return value > before if self.higher else value < before

    @property
    def noun(self) -> str:
        """The number in words: `held-out loss`, or the name of a metric."""
        return "held-out loss" if self.name == LOSS else self.name

    @property
    def best(self) -> str:
        """The best value in words: `lowest held-out loss`."""
        return f"{'highest' if self.higher else 'lowest'} {self.noun}"

    @property
    def is_best(self) -> str:
        """The weights with the best value in words: `whose held-out loss is the lowest`."""
        return f"whose {self.noun} is the {'highest' if self.higher else 'lowest'}"

    @property
    def improved(self) -> str:
        """A better value in words: `lower held-out loss`."""
        return f"{'higher' if self.higher else 'lower'} {self.noun}"

    @property
    def always_computed(self) -> bool:
        """True if every run computes the number."""
        return self.name == LOSS

    def check(self, metrics: bool, known: Sequence[str] = ()) -> None:
        """Check that a run computes the number.

        Args:
            metrics: the caller gives functions, whose names are known only after their first call.
            known: metrics that the objective computes.

        Raises:
            RecipeError: the run does not.
        """
        if self.name != LOSS and self.name not in known and not metrics:
            raise RecipeError(f"training.best_by: {self.needs}")

    def check_computed(self, metrics: Sequence[str]) -> None:
        """Check that the number is one of the metrics that an evaluation computed.

        Raises:
            FunctionError: it is not.
        """
        if self.name != LOSS and self.name not in metrics:
            raise FunctionError(
                f"training.best_by: no function in metrics= returned {self.name}; they returned {listed([*metrics])}. "
                "The run has stopped and is saved; give the function, and continue with resume=True"
            )

    @property
    def needs(self) -> str:
        """The advice for a run that has no function for the number."""
        return (
            f"{self.name} is computed by a function of yours: train with qlora.train(recipe, metrics=FUNCTION) in "
            "Python, also to resume, or leave best_by out to follow the held-out loss"
        )
