"""OpenAI chat format: a list of messages with `role` and `content`."""

from collections.abc import Mapping

from qlora.formats.format import Conversation, Format, Row
from qlora.formats.turns import conversation

_ROLES = {role: role for role in ("system", "user", "assistant")}


def _parse(row: Row, names: Mapping[str, str]) -> Conversation:
    return conversation(row, names["messages"], speaker="role", content="content", roles=_ROLES)


FORMAT = Format("messages", ("messages",), _parse, "chat")
