"""Outcome of a run."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Self

from qlora.memory.measure import Peak
from qlora.report import outcome
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

    def __repr__(self) -> str:
        """Show the run and its numbers in one line, without facts."""
        shown = (
            "run",
            "result",
            "steps",
            "total_steps",
            "loss_before",
            "loss_after",
            "metrics",
            "stopped_by",
        )
        values = ((name, getattr(self, name)) for name in shown)
        plain = (
            f"{name}={str(value)!r}" if isinstance(value, Path) else f"{name}={value!r}"
            for name, value in values
        )
        return f"TrainResult({', '.join(plain)})"

    def __str__(self) -> str:
        """Show losses, metrics, steps, time and memory, one a line."""
        return "\n".join(f"{label:14} {text}" for label, text in outcome.rows(self.as_json()))

    def _repr_html_(self) -> str:
        """Show the same in a notebook, with links to the report and the result."""
        return outcome.html(self.as_json())

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
            found = cls(
                **{"result_step": fields["steps"], **fields, **paths, "memory": Peak(**fields["memory"])}
            )
            metrics = dict(found.metrics or {}).values()
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_result(file, f"it does not hold an outcome: {error}") from error
        numbers = [found.steps, found.total_steps, found.seconds, found.memory.resident_bytes, *metrics]
        optional = [found.loss_before, found.loss_after, found.stopped_by, *astuple(found.memory)]
        numbers += [number for number in optional if number is not None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise damaged_result(file, "a value that must be a number is not one")
        return found
