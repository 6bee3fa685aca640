"""OpenAI chat format: a list of messages with `role` and `content`."""

from collections.abc import Mapping

from qlora.formats.format import Conversation, Format, Row
from qlora.formats.turns import OPTIONAL, conversation


def _parse(row: Row, names: Mapping[str, str]) -> Conversation:
    return conversation(row, names["messages"], speaker="role", content="content")


FORMAT = Format("messages", ("messages",), _parse, "chat", optional=OPTIONAL)
