"""Picture of the losses of a run in progress."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.report import history
from qlora.report.curves import loss_chart


class LossPicture:
    """The training loss and the held-out loss so far.

    Args:
        record: the run's metrics.jsonl, which has the steps of earlier sessions.
    """

    def __init__(self, record: Path) -> None:
        self._history = history.read(record)

    def step(self, record: Mapping[str, Any]) -> None:
        """Add a step."""
        self._history.steps.append(dict(record))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Add an evaluation."""
        self._history.evaluations.append(dict(record))

    def svg(self) -> str:
        """Return the picture as an SVG element; empty before the first step."""
        return loss_chart(self._history).svg if self._history.steps else ""
