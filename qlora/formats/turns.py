"""Parses the message lists of chat formats into conversations."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.formats.format import BadRow, Conversation, Message, NotTrained, Row, is_empty
from qlora.formats.tool_calls import calls_of, parsed_calls, tools_of
from qlora.formats.values import described, present, text
from qlora.formats.weights import COLUMNS as WEIGHTS
from qlora.formats.weights import is_trained, require_trained

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Columns of models that see or hear; a text model cannot use such rows."""
OPTIONAL = ("system", "tools", *WEIGHTS, *MEDIA)
"""Columns that every chat format reads if a row has them."""

CALL = "call"
"""Role of a message that is itself a tool call, as ShareGPT's function_call."""

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name of the system message
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_KEYS = ("tool_calls", "function_call", "tool_call_id", "name", *_REASONING, *WEIGHTS)


def conversation(
    row: Row, name: str, *, speaker: str, content: str, roles: Mapping[str, str] = ROLES
) -> Conversation:
    """Parse the messages of a row, with its `system` and `tools` columns and its weights.

    The order of roles is free: the chat template decides about it.

    Args:
        row: a row of the data set.
        name: column with the list of messages.
        speaker: key of a message's speaker.
        content: key of a message's text.
        roles: speaker -> role for chat templates.

    Raises:
        BadRow: the column is not a valid list of messages, or none of them is an answer to train.
    """
    return assembled(row, messages_of(row, name, speaker=speaker, content=content, roles=roles))


@dataclass
class Messages:
    """Parsed messages: what `Conversation` says about them."""

    messages: list[Message] = field(default_factory=list)
    context: set[int] = field(default_factory=set)
    unused: dict[str, None] = field(default_factory=dict)


def assembled(row: Row, parsed: Messages) -> Conversation:
    """Complete parsed messages by the other columns of their row. Raises BadRow."""
    for name in MEDIA:
        if not is_empty(row.get(name)):
            raise BadRow("not text", f"{name!r}; only text is supported")
    other_marks = require_trained(row)
    messages, context = parsed.messages, parsed.context
    if not is_empty(row.get("system")):
        system = {"role": "system", "content": text(row, "system")}
        if messages[0]["role"] != "system":
            messages, context = [system, *messages], {index + 1 for index in context}
        elif messages[0]["content"] != system["content"]:
            raise BadRow("two system messages", "in the column 'system' and in the first message; keep one")
    result = Conversation(tuple(messages), tools_of(row), frozenset(context), (*parsed.unused, *other_marks))
    preference = [key for key in row if "chosen" in key or "rejected" in key]
    if preference and messages[-1]["role"] != "assistant":
        raise BadRow(
            "preference data",
            f"the answers are in {' and '.join(map(repr, preference))}; no objective uses them",
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no answer", "no message is the assistant's")
    if not result.trained:
        raise NotTrained("marked as not to be trained", "every answer has weight 0")
    return result


def messages_of(
    row: Row, name: str, *, speaker: str, content: str, roles: Mapping[str, str] = ROLES
) -> Messages:
    """Parse the list of messages in one column. Arguments and errors as in `conversation`."""
    parsed = Messages()
    for number, turn in enumerate(_list(row, name, speaker), 1):
        where = f"message {number}: "
        if not isinstance(turn, Mapping):
            raise BadRow(
                "wrong type",
                f"{where}must be an object with {speaker!r} and {content!r}, not {described(turn)}",
            )
        said = text(turn, speaker, where)
        role = roles.get(said)
        if role is None:
            raise BadRow("unknown role", f"{where}{said!r} is not one of {', '.join(roles)}")
        message = _message(turn, role, content, where)
        if not is_trained(turn, where, answer=message["role"] == "assistant"):
            if message["role"] == "assistant":
                parsed.context.add(number - 1)
        elif is_empty(message["content"]) and len(message) == 2:
            raise BadRow("empty answer", f"message {number}")
        if role == "user" and is_empty(message["content"]):
            raise BadRow("empty prompt", f"message {number}")
        for key, value in turn.items():
            if key not in (speaker, content, *_KEYS) and not is_empty(value):
                parsed.unused[f"message key {key}"] = None
        parsed.messages.append(message)
    return parsed


def _list(row: Row, name: str, speaker: str) -> list[Any]:
    value = present(row, name)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        # a CSV cell is text, so a list in it is JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("broken JSON", f"in {name!r}: {error}") from None
    if isinstance(value, Mapping):
        value = _rows(value, name, speaker)
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{name!r} must be a list of messages, not {described(value)}")
    if not value:
        raise BadRow("empty conversation", f"{name!r} has no messages")
    return value


def _rows(columns: Mapping[str, Any], name: str, speaker: str) -> list[Any]:
    """Return the messages of a struct of lists ({role: [...], content: [...]}), or a single message in a list."""
    if isinstance(columns.get(speaker), str):
        return [columns]
    lists = {key: value for key, value in columns.items() if isinstance(value, list)}
    if set(lists) != set(columns) or len({len(value) for value in lists.values()}) != 1:
        raise BadRow("wrong type", f"{name!r} must be a list of messages, or an object of equally long lists")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _message(turn: Mapping[str, Any], role: str, content: str, where: str) -> Message:
    """Return one message in the layout of chat templates."""
    calls = calls_of(turn, where)
    thoughts = dict.fromkeys(text(turn, key, where) for key in _REASONING if not is_empty(turn.get(key)))
    if len(thoughts) > 1:
        raise BadRow("two thoughts", f"{where}has more than one of {', '.join(_REASONING)}; keep one")
    reasoning = next(iter(thoughts), "")
    value = turn.get(content)
    if role == CALL:
        role, calls, value = "assistant", [*parsed_calls(text(turn, content, where), where), *calls], ""
    elif isinstance(value, list):
        value, thought, more = _parts(value, where)
        reasoning, calls = reasoning + thought, [*calls, *more]
    elif value is None and (calls or (reasoning and content in turn)):
        value = ""
    elif isinstance(value, Mapping) and role == "tool":
        value = json.dumps(value, ensure_ascii=False)
    else:
        value = text(turn, content, where)
    message: dict[str, Any] = {"role": role, "content": value}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if not is_empty(turn.get(key)):
            message[key] = text(turn, key, where)
    if role != "assistant" and (calls or reasoning):
        raise BadRow("wrong role", f"{where}only the assistant can reason and call tools, not {role}")
    return message


def _parts(parts: list[Any], where: str) -> tuple[str, str, list[Mapping[str, Any]]]:
    """Return text, reasoning and tool calls of a message in parts, as OpenAI ([{"type": "text", "text": ...}])
    and LLaMA-Factory ([{"type": "text", "value": ...}]) write it."""
    said: list[str] = []
    thoughts: list[str] = []
    calls: list[Mapping[str, Any]] = []
    for number, part in enumerate(parts, 1):
        place = f"{where}part {number}: "
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "reasoning", "thinking", "tool_call"):
            raise BadRow("not text", f"{place}is {kind or described(part)!r}; only text is supported")
        key = next((key for key in (kind, "text", "value") if key in part), "text")
        if part.get(key) is None:
            has = ", ".join(repr(key) for key in part)
            raise BadRow("missing field", f"{place}'text' or 'value' (the part has {has})")
        if kind == "tool_call":
            calls += parsed_calls(part[key], place)
        else:
            (said if kind == "text" else thoughts).append(text(part, key, place))
    return "".join(said), "".join(thoughts), calls
