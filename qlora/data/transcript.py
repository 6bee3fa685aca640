"""Short text of the messages before a question, for people who read sample answers."""

from collections.abc import Sequence

from qlora.formats import Message

MESSAGES = 6
"""last messages that are shown"""

CHARACTERS = 200
"""beginning of a message that is shown"""


def transcript(messages: Sequence[Message]) -> str:
    """Return one line a message, such as `user: Where is it?`; empty without messages. Long texts are cut."""
    left_out = len(messages) - MESSAGES
    lines = [f"({left_out} earlier messages)"] if left_out > 0 else []
    return "\n".join([*lines, *map(_line, messages[-MESSAGES:])])


def _line(message: Message) -> str:
    calls = [f"(calls {call['function']['name']})" for call in message.get("tool_calls") or ()]
    text = " ".join([*str(message["content"]).split(), *calls])
    shown = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"
    return f"{message['role']}: {shown}"
