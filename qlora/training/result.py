"""Outcome of a run."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Self

from qlora.memory.measure import Peak
from qlora.training.run_folder import damaged_result


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run. Losses are nats per supervised held-out token, None without held-out rows."""

    run: Path
    result: Path | None
    """folder of the trained adapter (or model); None if the run was stopped early"""
    steps: int
    total_steps: int
    loss_before: float | None
    loss_after: float | None
    memory: Peak
    seconds: float
    """duration of the whole run, all sessions together, without the work that a kill lost"""
    stopped_by: int | str | None = None
    """number of the signal that stopped the run early, or "on_step" if that function did"""
    facts: dict[str, Any] | None = None
    """facts known before the first step (see `qlora.report.facts`); None for a run of an earlier version"""
    result_step: int | None = None
    """step after which the weights of the result were trained; None without one, or in a run of an earlier version"""
    adapter: dict[str, Any] | None = None
    """what the adapter method found during the run, such as the final ranks; None for a run of an earlier version"""
    metrics: dict[str, float] | None = None
    """metrics of the result, or of the latest evaluation of a run that was stopped; None for an earlier version"""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as stored in a run's result.json."""
        return {
            **asdict(self),
            "run": str(self.run),
            "result": None if self.result is None else str(self.result),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: Path) -> Self:
        """Rebuild an outcome from `as_json` values read from `file`. Raises ModelError if the values are invalid."""
        fields = {name: value for name, value in values.items() if name != "run_id"}
        try:
            paths = {"run": Path(fields["run"]), "result": Path(fields["result"])}
            outcome = cls(
                **{"result_step": fields["steps"], **fields, **paths, "memory": Peak(**fields["memory"])}
            )
        except (KeyError, TypeError) as error:
            raise damaged_result(file, f"it does not hold an outcome: {error}") from error
        numbers = [outcome.steps, outcome.total_steps, outcome.seconds, outcome.memory.resident_bytes]
        optional = [outcome.loss_before, outcome.loss_after, outcome.stopped_by, *astuple(outcome.memory)]
        numbers += [number for number in optional if number is not None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise damaged_result(file, "a value that must be a number is not one")
        return outcome
