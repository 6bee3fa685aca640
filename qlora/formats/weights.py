"""Marks with which data sets exclude a row or an answer from training."""

from collections.abc import Mapping
from typing import Any

from qlora.formats.format import BadRow, NotTrained, Row

COLUMNS = ("weight", "train", "loss_mask", "loss_weight", "label")
"""Keys of rows and messages, as used by OpenAI (weight), Axolotl (train) and LLaMA-Factory (loss_weight, label)."""

_WORDS = {"true": True, "false": False, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
"""marks in a CSV cell, which is always text"""


def require_trained(row: Row) -> tuple[str, ...]:
    """Raise NotTrained if a row is marked as not to be trained. Return the marks that mean something else.

    `label` counts only if it is true or false (a judged answer, as in KTO data), since other labels are classes.
    """
    others = []
    for name in COLUMNS:
        value = _mark(row.get(name))
        if value is None or value == "":
            continue
        if not isinstance(value, bool if name == "label" else int | float) or value not in (0, 1):
            others.append(f"column {name}")
        elif not value:
            raise NotTrained("marked as not to be trained", f"{name}: {str(row[name]).lower()}")
    return tuple(others)


def is_trained(message: Mapping[str, Any], where: str, *, answer: bool) -> bool:
    """Return False if a message is marked as not to be trained, or is no answer.

    Raises:
        BadRow: the mark is no yes or no, or asks to train a message that is no answer.
    """
    trained = answer
    for name in COLUMNS:
        value = _mark(message.get(name))
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise BadRow("unknown weight", f"{where}{name}: {value!r}; use 0 or 1, or true or false")
        if value and not answer and name in ("train", "loss_mask", "loss_weight"):
            raise BadRow(
                "weight of a question", f"{where}{name}: {value!r}, but only answers are trained; remove it"
            )
        trained = trained and bool(value)
    return trained


def _mark(value: Any) -> Any:
    return _WORDS.get(value.strip().lower(), value.strip()) if isinstance(value, str) else value
