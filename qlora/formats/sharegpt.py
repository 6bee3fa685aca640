"""ShareGPT chat format: a list of messages with `from` and `value`."""

from collections.abc import Mapping

from qlora.formats.format import Conversation, Format, Row
from qlora.formats.turns import OPTIONAL, ROLES, conversation

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    **ROLES,
}


def _parse(row: Row, names: Mapping[str, str]) -> Conversation:
    return conversation(row, names["conversations"], speaker="from", content="value", roles=_ROLES)


FORMAT = Format("sharegpt", ("conversations",), _parse, "chat", optional=OPTIONAL)
