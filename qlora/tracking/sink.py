"""What a sink of the tracker does, and the sink that does nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Metrics = Mapping[str, Any]
"""numbers by name; `step` is always among them"""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, the answer it should get and the answer the model gave."""

    prompt: str
    reference: str
    answer: str


def memory_totals(content: Metrics) -> dict[str, float]:
    """memory.json's totals in GiB, by the names that trackers show them under."""
    return {
        f"memory/{name}_gib": content[name]["total_bytes"] / 2**30
        for name in ("documents", "forecast", "measured")
        if content[name] is not None
    }


class Sink:
    """Takes everything and keeps nothing; sinks override what they care about."""

    def step(self, record: Metrics) -> None:
        """One optimizer step: step, loss, lr, grad_norm, tokens_per_second, tokens, supervised_tokens."""

    def evaluation(self, record: Metrics) -> None:
        """One evaluation: step, eval_loss (nats per supervised token), eval_tokens."""

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """What the model answers to held-out prompts after `step` steps."""

    def memory(self, content: Metrics, picture: Path) -> None:
        """What the run took: memory.json's content, and memory.png."""

    def note(self, text: str) -> None:
        """A line the user should see."""

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """The end: release files, threads and the terminal. `failed` when an exception ended the run."""
