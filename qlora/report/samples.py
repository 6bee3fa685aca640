"""Sample answers of a run by prompt, from evaluation to evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

PROMPTS = 12
"""most prompts that are shown"""

EVALUATIONS = 8
"""most evaluations that are shown"""

MAX_LENGTH = 4000
"""most characters of a text that are shown"""


@dataclass(frozen=True)
class Answer:
    """The answer of the model from step `first` to step `last`."""

    first: int
    last: int
    text: str
    is_expected: bool


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, its expected answer (can be empty) and the answers of the model."""

    text: str
    expected: str
    answers: list[Answer]
    before: str = ""
    """the conversation before the prompt, shortened"""


def prompts(records: Sequence[dict[str, Any]]) -> list[Prompt]:
    """Return the first prompts with their answers at up to EVALUATIONS evaluations, evenly spaced from first to last.

    Equal answers at neighbouring evaluations are joined.

    Args:
        records: the records of metrics.jsonl with `samples`, in order.
    """
    if not records:
        return []
    last = len(records) - 1
    chosen = sorted({round(i * last / (EVALUATIONS - 1)) for i in range(EVALUATIONS)})
    shown = []
    for number, sample in enumerate(records[-1]["samples"][:PROMPTS]):
        given: list[Answer] = []
        for record in (records[i] for i in chosen):
            if number >= len(record["samples"]):
                continue  # the run was resumed with more samples
            text, step = record["samples"][number]["answer"], record["step"]
            if given and given[-1].text == _cut(text):
                given[-1] = replace(given[-1], last=step)
            else:
                given.append(Answer(step, step, _cut(text), text.strip() == sample["reference"].strip()))
        before = sample.get("before", "")  # missing in runs of older versions
        shown.append(Prompt(_cut(sample["prompt"]), _cut(sample["reference"]), given, _cut(before)))
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} …"
