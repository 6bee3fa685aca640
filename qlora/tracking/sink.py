"""Base class of the tracker's sinks, and the types that sinks receive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Metrics = Mapping[str, Any]
"""metrics by name; those of a step or an evaluation include `step`"""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, the expected answer (`reference`) and the model's answer."""

    prompt: str
    reference: str
    answer: str
    before: str = ""
    """the conversation before the prompt, shortened"""


def metrics_in(evaluation: Metrics) -> dict[str, float]:
    """Return the metrics in the record of an evaluation, by the names that the objective or the caller gave them.

    Examples:
        >>> metrics_in({"step": 4, "eval_loss": 1.5, "eval_tokens": 90, "eval_exact_match": 0.25})
        {'exact_match': 0.25}
    """
    own = ("eval_loss", "eval_tokens")
    return {
        name.removeprefix("eval_"): value
        for name, value in evaluation.items()
        if name.startswith("eval_") and name not in own
    }


def memory_totals(content: Metrics) -> dict[str, float]:
    """Return the totals of memory.json in GiB, by the names that trackers show."""
    return {
        f"memory/{name}_gib": content[name]["total_bytes"] / 2**30
        for name in ("documents", "forecast", "measured")
        if content[name] is not None
    }


class Sink:
    """Sink that ignores everything; subclasses override the methods they need."""

    def step(self, record: Metrics) -> None:
        """Record an optimizer step: step, loss, lr, grad_norm, tokens_per_second, tokens, supervised_tokens.

        `aux_loss` is the auxiliary loss, without its coefficient; only in runs that have one.
        """

    def evaluation(self, record: Metrics) -> None:
        """Record an evaluation: step, eval_loss (nats per supervised token), eval_tokens, eval_ with each metric."""

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Record the model's answers to held-out prompts after `step` steps."""

    def memory(self, content: Metrics, picture: Path) -> None:
        """Record the run's memory: the content of memory.json, and the file memory.png."""

    def note(self, text: str) -> None:
        """Show a line to the user."""

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Release files, threads and the terminal. `failed` is True if an exception ended the run."""
