"""Contents of a run's metrics.jsonl: steps, evaluations and sample answers."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qlora.tracking.sink import metrics_in

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

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every evaluation by the name of a metric."""
        found: dict[str, list[tuple[int, float]]] = {}
        for record in self.evaluations:
            for name, value in metrics_in(record).items():
                if _is_number(value):
                    found.setdefault(name, []).append((record["step"], float(value)))
        return found


def read(path: Path) -> History:
    """Read a metrics.jsonl. Lines that are incomplete or damaged are skipped: a run can be in progress or killed."""
    records = list(_records(path)) if path.is_file() else []
    return History(
        steps=[record for record in records if _is_step(record)],
        evaluations=[record for record in records if _is_number(record.get("eval_loss"))],
        samples=[record for record in records if _are_samples(record.get("samples"))],
    )


def _records(path: Path) -> Iterator[Record]:
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _is_step(record: Record) -> bool:
    counts = [record.get(key) for key in ("tokens", "supervised_tokens", "tokens_per_second")]
    return (
        all(isinstance(count, int | float) and 0 <= count < math.inf for count in counts)
        and all(_is_number(record.get(key)) for key in ("loss", "lr", "grad_norm"))
        and bool(record["tokens"] and record["tokens_per_second"])
    )


def _is_number(value: Any) -> bool:
    """Return True for a number, also for one that JSON does not have and that is stored as text, such as "nan"."""
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")


def _are_samples(value: Any) -> bool:
    texts = ("prompt", "reference", "answer")
    return isinstance(value, list) and all(
        isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in texts)
        for sample in value
    )
