"""How a run ended."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Self

from qlora.memory.measure import Peak
from qlora.training.run_folder import damaged_result


@dataclass(frozen=True)
class TrainResult:
    """The end of a run. Losses are nats per supervised held-out token; None without held-out rows."""

    run: Path
    result: Path | None
    """the trained adapter (or model) folder; None when the run was stopped before its end"""
    steps: int
    total_steps: int
    loss_before: float | None
    loss_after: float | None
    memory: Peak
    seconds: float
    stopped_by: int | None = None
    """the signal that stopped the run early"""

    def as_json(self) -> dict[str, Any]:
        """Plain values, as in a run's result.json."""
        return {
            **asdict(self),
            "run": str(self.run),
            "result": None if self.result is None else str(self.result),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: Path) -> Self:
        """Read what `as_json` gave back from the content of `file`. Raises ModelError if that cannot be right."""
        about = {name: value for name, value in values.items() if name != "run_id"}
        try:
            places = {"run": Path(about["run"]), "result": Path(about["result"])}
            found = cls(**{**about, **places, "memory": Peak(**about["memory"])})
        except (KeyError, TypeError) as error:
            raise damaged_result(file, f"it states no outcome: {error}") from error
        numbers = [found.steps, found.total_steps, found.seconds, found.memory.resident_bytes]
        optional = [found.loss_before, found.loss_after, found.stopped_by, *astuple(found.memory)]
        numbers += [number for number in optional if number is not None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise damaged_result(file, "where a number belongs there is none")
        return found
