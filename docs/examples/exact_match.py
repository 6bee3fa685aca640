"""Train the quickstart with a metric and a stop: the best weights are those with the most answers that are right.

python docs/examples/exact_match.py [SETTING=VALUE ...]
"""

import sys
from collections.abc import Mapping
from typing import Any

import qlora
from qlora.training.functions import HeldOut

ROWS = 20
"""held-out rows that the model answers at each evaluation; all of them take longer"""


def answers_right(held_out: HeldOut) -> dict[str, float]:
    """Compare the model's own answers with the expected ones, as a whole and field by field."""
    rows = held_out.examples[:ROWS]
    given = [(held_out.answer(row, max_new_tokens=24), row.reference.strip()) for row in rows]
    fields = [
        (one, other)
        for answer, expected in given
        for one, other in zip(f"{answer};;".split(";"), expected.split(";"), strict=False)
    ]
    return {
        "exact_match": sum(answer == expected for answer, expected in given) / len(given),
        "field_match": sum(one == other for one, other in fields) / len(fields),
    }


class StopWhenLearned:
    """Stops a run once the training loss has been below a limit for some steps in a row."""

    def __init__(self, limit: float, steps: int) -> None:
        self.limit, self.steps, self.below = limit, steps, 0

    def __call__(self, record: Mapping[str, Any]) -> bool:
        self.below = self.below + 1 if record["loss"] < self.limit else 0
        return self.below >= self.steps


if __name__ == "__main__":
    settings = [
        "output=runs/exact-match",
        "training.result=best",
        "training.best_by=highest exact_match",
        "training.eval_every=50",
    ]
    recipe = qlora.Recipe.load("quickstart", [*settings, *sys.argv[1:]])
    outcome = qlora.train(recipe, fresh=True, metrics=answers_right, on_step=StopWhenLearned(0.01, 20))
    print(outcome)
