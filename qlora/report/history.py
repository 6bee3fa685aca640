"""Contents of a run's metrics.jsonl: steps, evaluations and sample answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class History:
    """The records of a run in order, by kind; `qlora.tracking` describes their fields."""

    steps: list[Record]
    evaluations: list[Record]
    samples: list[Record]

    @property
    def last_step(self) -> int:
        """Number of steps taken so far."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds(self) -> float:
        """Duration of the steps in seconds, without loading, evaluations and checkpoints."""
        return sum(step["tokens"] / step["tokens_per_second"] for step in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps; None before the first step."""
        return median(step["tokens_per_second"] for step in self.steps) if self.steps else None

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, loss in nats a supervised token) of every evaluation."""
        return [(record["step"], float(record["eval_loss"])) for record in self.evaluations]


def read(path: Path) -> History:
    """Read a metrics.jsonl. Incomplete lines are skipped: a run can be in progress or killed."""
    records = list(_records(path)) if path.is_file() else []
    return History(
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "eval_loss" in record],
        samples=[record for record in records if "samples" in record],
    )


def _records(path: Path) -> Iterator[Record]:
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield record
