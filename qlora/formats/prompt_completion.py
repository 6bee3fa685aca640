"""Prompt-completion format: two texts, used unchanged, or two lists of messages (TRL's conversational layout)."""

from collections.abc import Mapping

from qlora.formats.format import Completion, Conversation, Format, Row
from qlora.formats.turns import OPTIONAL, assembled, messages_of
from qlora.formats.values import filled
from qlora.formats.weights import COLUMNS as WEIGHTS
from qlora.formats.weights import require_trained


def _parse(row: Row, names: Mapping[str, str]) -> Completion | Conversation:
    prompt, completion = names["prompt"], names["completion"]
    if isinstance(row.get(prompt), list | Mapping) and isinstance(row.get(completion), list | Mapping):
        return _conversation(row, prompt, completion)
    others = require_trained(row)
    unused = [f"column {name}" for name in OPTIONAL if name not in WEIGHTS and row.get(name)]
    texts = filled(row, prompt, "empty prompt"), filled(row, completion, "empty answer")
    return Completion(*texts, unused=(*others, *unused))


def _conversation(row: Row, prompt: str, completion: str) -> Conversation:
    """Return the messages of both columns; only those of the completion are trained."""
    parsed = messages_of(row, prompt, speaker="role", content="content")
    rest = messages_of(row, completion, speaker="role", content="content")
    before = len(parsed.messages)
    parsed.context |= {i for i, message in enumerate(parsed.messages) if message["role"] == "assistant"}
    parsed.context |= {before + index for index in rest.context}
    parsed.messages += rest.messages
    parsed.unused |= rest.unused
    return assembled(row, parsed)


FORMAT = Format("prompt-completion", ("prompt", "completion"), _parse, "pair", optional=OPTIONAL)
