"""What a run's metrics.jsonl tells: its steps, its evaluations, its sample answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class History:
    """The records of a run in their order, by kind; see `qlora.tracking` for what stands in them."""

    steps: list[Record]
    evaluations: list[Record]
    samples: list[Record]

    @property
    def last_step(self) -> int:
        """Steps taken so far."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds(self) -> float:
        """Time of the steps alone, without loading, evaluations and checkpoints."""
        return sum(step["tokens"] / step["tokens_per_second"] for step in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the step in the middle; None before the first."""
        return median(step["tokens_per_second"] for step in self.steps) if self.steps else None

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, nats a supervised token) of every evaluation."""
        return [(record["step"], float(record["eval_loss"])) for record in self.evaluations]


def read(path: Path) -> History:
    """The history in a metrics.jsonl; of a run that is being written, or was killed, all whole lines."""
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
