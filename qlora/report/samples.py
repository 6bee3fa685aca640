"""The sample answers of a run, prompt by prompt: how they changed from evaluation to evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

PROMPTS = 12
EVALUATIONS = 8
"""at most so many are shown"""

MAX_LENGTH = 4000
"""characters shown of a text"""


@dataclass(frozen=True)
class Answer:
    """What the model said from step `first` to step `last`."""

    first: int
    last: int
    text: str
    is_expected: bool


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, the answer it should get (may be empty), and the answers it got."""

    text: str
    expected: str
    answers: list[Answer]


def prompts(records: Sequence[dict[str, Any]]) -> list[Prompt]:
    """The first prompts, each with its answers at the first, the last and evenly chosen evaluations between.

    Neighbouring answers that are the same are one.
    """
    if not records:
        return []
    last = len(records) - 1
    chosen = sorted({round(i * last / (EVALUATIONS - 1)) for i in range(EVALUATIONS)})
    found = []
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
        found.append(Prompt(_cut(sample["prompt"]), _cut(sample["reference"]), given))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} …"
