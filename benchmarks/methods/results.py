"""Results of an experiment as the report needs them: for each label the chosen setting and its values by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.methods.cell import Cell, Setting
from benchmarks.methods.experiments import SCREENING, SEEDS, Experiment
from benchmarks.methods.ledger import Records
from benchmarks.methods.statistics import Interval, Paired, holm

LOSS, BLEU = "loss_after", "bleu"


@dataclass(frozen=True)
class Result:
    """One label of an experiment: its chosen setting and the records of the seeds that no choice has used."""

    label: str
    setting: Setting
    records: dict[int, dict[str, Any]]
    """by seed: those of `SEEDS`, or the screening alone if none has run"""
    screening: dict[str, Any]
    """the record of the screening seed"""

    @property
    def screened_only(self) -> bool:
        """True if only the seed that chose the learning rate has run."""
        return SCREENING in self.records

    @property
    def first(self) -> dict[str, Any]:
        """One of the records, for what does not depend on the seed."""
        return next(iter(self.records.values()))

    @property
    def lr(self) -> float | None:
        """Learning rate of the chosen setting."""
        return self.setting.get("optimizer.lr")

    def values(self, metric: str) -> dict[int, float]:
        """Return the metric by seed, without seeds that have none."""
        return {
            seed: record[metric] for seed, record in self.records.items() if record.get(metric) is not None
        }

    def interval(self, metric: str) -> Interval | None:
        """Return mean and confidence interval of the metric; None without a value."""
        values = list(self.values(metric).values())
        return Interval.of(values) if values else None

    def against(self, other: "Result", metric: str) -> Paired | None:
        """Return the paired difference from another result; None without a common seed."""
        first, second = self.values(metric), other.values(metric)
        return Paired.of(first, second) if first.keys() & second.keys() else None


def results(experiment: Experiment, records: Records) -> dict[str, Result]:
    """Return the results of the labels whose screening is complete, in the order of the experiment."""
    found = {}
    for label, setting in experiment.chosen(records).items():
        by_seed = {seed: records[key] for seed in SEEDS if (key := Cell(setting, seed).key) in records}
        screening = records[Cell(setting, SCREENING).key]
        found[label] = Result(label, setting, by_seed or {SCREENING: screening}, screening)
    return found


def corrected(found: Mapping[str, Result], reference: str, metric: str) -> dict[str, float]:
    """Return the p of each label's difference from the reference, after Holm's correction over all labels."""
    if reference not in found:
        return {}
    pairs = {
        label: result.against(found[reference], metric)
        for label, result in found.items()
        if label != reference
    }
    return holm({label: pair.p for label, pair in pairs.items() if pair is not None and pair.p is not None})
