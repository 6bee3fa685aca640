"""Differences between the recipe that began a run and the one that resumes it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESUMABLE_KEYS = {
    "output", "tracking", "training.max_steps", "training.epochs", "training.eval_every", "training.save_every",
    "training.keep_checkpoints", "training.patience", "training.result", "training.samples", "training.sample_tokens",
    "training.activation_offloading", "base.embedding", "base.compute_dtype",
}  # fmt: skip
"""keys that can change when a run is resumed: they do not affect the steps already taken. (`compute_dtype` can, from
`auto` to the dtype that this was: each checkpoint knows it.)"""

ROUNDING_KEYS = {"training.micro_batch_size", "training.activation_checkpointing", "training.loss_chunk"}
"""keys that can change too, but with a note: the same sums are rounded in another order, or computed again"""

NEW_KEYS = {"training.router_loss"}
"""keys that a run of an earlier version has not: whatever they say now, the run did not compute it"""


def keys_since(recorded: Path) -> set[str]:
    """Return the keys that the recipe recorded in a run of an earlier version does not have."""
    text = recorded.read_text()
    return {key for key in NEW_KEYS if f"{key.rpartition('.')[2]}:" not in text}


def effect_of(key: str, record: Path) -> str:
    """Return sentences about the effect of a change of one of `ROUNDING_KEYS` on the run with this metrics.jsonl."""
    if key == "training.micro_batch_size" and record.is_file() and b'"aux_loss"' in record.read_bytes():
        return (
            "The load-balancing loss of a mixture is a function of the micro-batch, so from here on the run trains "
            "with another one"
        )
    return (
        "The run computes the same, but rounds differently from here on, so it will not end bit for bit as with the "
        "old value"
    )


def differences(
    old: dict[str, Any], new: dict[str, Any], may_change: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of every changed key that is not in `may_change`."""
    for key in {**old, **new}:
        name = f"{prefix}{key}"
        if name in may_change:
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from differences(old[key], new[key], may_change, f"{name}.")
        elif old.get(key) != new.get(key):
            yield name, old.get(key), new.get(key)
