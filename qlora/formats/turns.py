"""Parses the message lists of chat formats into conversations."""

import json
from collections.abc import Mapping
from typing import Any

from qlora.formats.format import BadRow, Conversation, Message, Row
from qlora.formats.values import described, present, text


def conversation(
    row: Row, name: str, *, speaker: str, content: str, roles: Mapping[str, str]
) -> Conversation:
    """Parse the messages of a row, and check their order as chat templates need it.

    Args:
        row: a row of the data set.
        name: column with the list of messages.
        speaker: key of a message's speaker.
        content: key of a message's text.
        roles: speaker -> role for chat templates.

    Raises:
        BadRow: the column is not a valid list of messages.
    """
    turns = [_turn(turn, number, speaker, content) for number, turn in enumerate(_list(row, name), 1)]
    return _in_turn(turns, roles)


def _list(row: Row, name: str) -> list[Any]:
    value = present(row, name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        # a CSV cell is text, so a list in it is JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("broken JSON", f"in {name!r}: {error}") from None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{name!r} must be a list of messages, not {described(value)}")
    if not value:
        raise BadRow("empty conversation", f"{name!r} has no messages")
    return value


def _turn(turn: Any, number: int, speaker: str, content: str) -> tuple[int, str, str]:
    """Return (number, speaker, text) of one message."""
    where = f"message {number}: "
    if not isinstance(turn, Mapping):
        raise BadRow(
            "wrong type",
            f"{where}must be an object with {speaker!r} and {content!r}, not {described(turn)}",
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow("tool call", f"{where}tool calls are not supported")
    parts = turn.get(content)
    if isinstance(parts, list):  # OpenAI's content parts: [{"type": "text", "text": ...}, ...]
        turn = {**turn, content: "".join(_part(part, where) for part in parts)}
    return number, text(turn, speaker, where), text(turn, content, where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, Mapping) else described(part)
        raise BadRow("not text", f"{where}contains {kind}; only text is supported")
    return text(part, "text", where)


def _in_turn(turns: list[tuple[int, str, str]], roles: Mapping[str, str]) -> Conversation:
    """Check the order of roles: an optional system message, then user and assistant alternately."""
    messages: list[Message] = []
    for number, speaker, content in turns:
        role = roles.get(speaker)
        if role is None:
            raise BadRow("unknown role", f"message {number}: {speaker!r} is not one of {', '.join(roles)}")
        before = messages[-1]["role"] if messages else ""
        allowed = {
            "": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user",),
        }
        if role not in allowed[before]:
            position = f"after {before}" if before else "as the first message"
            expected = " or ".join(allowed[before])
            raise BadRow("roles out of order", f"message {number}: {role} {position}, expected {expected}")
        if role == "assistant" and not content.strip():
            raise BadRow("empty answer", f"message {number}")
        if role == "user" and not content.strip():
            raise BadRow("empty prompt", f"message {number}")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant":
        raise BadRow("roles out of order", f"ends with a {messages[-1]['role']} message, not with an answer")
    return Conversation(tuple(messages))
