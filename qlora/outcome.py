"""What a run came to."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from qlora.memory.measure import Peak


@dataclass(frozen=True)
class Outcome:
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
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `as_json` gave."""
        places = {"run": Path(values["run"]), "result": Path(values["result"])}
        return cls(**{**values, **places, "memory": Peak(**values["memory"])})
