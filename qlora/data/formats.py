"""A row of a data set -> a conversation, or a prompt and its completion. What does not fit is a BadRow."""

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.errors import DataError

Row = Mapping[str, Any]
Message = Mapping[str, str]

FIELDS = {
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "completion": ("text",),
}
"""The fields of each format, as its own data sets name them."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
"""Who speaks in ShareGPT data -> the role that chat templates know."""


class BadRow(ValueError):
    """Why a row cannot be used: a kind that rows share, for totals, and the detail of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` (system, user, assistant) and `content`, ending with an assistant's.

    A user's message of an Alpaca row also has `instruction` and `input`, for templates that tell them apart.
    """

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text to be learned, after a prompt. The prompt of plain text is empty."""

    prompt: str
    completion: str


def parser(format: str, columns: Mapping[str, str]) -> Callable[[Row], Conversation | Completion]:
    """The function that reads a row of this format.

    Args:
        format: a key of FIELDS.
        columns: the format's field -> the data's own name of that column, where they differ.

    Raises:
        DataError: `columns` names a field that the format has not. (The function returned raises BadRow.)
    """
    fields = FIELDS[format]
    unknown = [field for field in columns if field not in fields]
    if unknown:
        raise DataError(
            f"data.columns: the {format} format has no field {unknown[0]!r}; "
            f"its fields are {', '.join(fields)}, each written as field: column"
        )
    names = {field: columns.get(field, field) for field in fields}
    readers: dict[str, Callable[[Row, Mapping[str, str]], Conversation | Completion]] = {
        "alpaca": _alpaca,
        "messages": _messages,
        "sharegpt": _sharegpt,
        "prompt-completion": _prompt_completion,
        "completion": _completion,
    }
    read = readers[format]
    return lambda row: read(row, names)


def _alpaca(row: Row, names: Mapping[str, str]) -> Conversation:
    instruction = _filled(row, names["instruction"], "empty prompt")
    context = "" if row.get(names["input"]) is None else _text(row, names["input"])
    context = context if context.strip() else ""
    output = _filled(row, names["output"], "empty answer")
    content = f"{instruction}\n\n{context}" if context else instruction
    question = {"role": "user", "content": content, "instruction": instruction, "input": context}
    return Conversation((question, {"role": "assistant", "content": output}))


def _messages(row: Row, names: Mapping[str, str]) -> Conversation:
    turns = _turns(row, names["messages"])
    messages = [_message(turn, number, "role", "content") for number, turn in enumerate(turns, 1)]
    return _conversation(messages, roles={role: role for role in ("system", "user", "assistant")})


def _sharegpt(row: Row, names: Mapping[str, str]) -> Conversation:
    turns = _turns(row, names["conversations"])
    messages = [_message(turn, number, "from", "value") for number, turn in enumerate(turns, 1)]
    return _conversation(messages, roles=_SPEAKERS)


def _prompt_completion(row: Row, names: Mapping[str, str]) -> Completion:
    prompt = _filled(row, names["prompt"], "empty prompt")
    return Completion(prompt, _filled(row, names["completion"], "empty answer"))


def _completion(row: Row, names: Mapping[str, str]) -> Completion:
    return Completion("", _filled(row, names["text"], "empty text"))


def _turns(row: Row, name: str) -> list[Any]:
    value = _present(row, name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        # a CSV cell can hold nothing but text
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("broken JSON", f"in {name!r}: {error}") from None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{name!r} must be a list of messages, it is {_kind(value)}")
    if not value:
        raise BadRow("empty conversation", f"{name!r} has no messages")
    return value


def _message(turn: Any, number: int, role: str, content: str) -> tuple[int, str, str]:
    """(number, who, text) of one turn."""
    where = f"message {number}: "
    if not isinstance(turn, Mapping):
        raise BadRow(
            "wrong type", f"{where}must be an object with {role!r} and {content!r}, it is {_kind(turn)}"
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow("tool call", f"{where}calls of tools are not supported")
    parts = turn.get(content)
    if isinstance(parts, list):  # the OpenAI way: [{"type": "text", "text": ...}, ...]
        turn = {**turn, content: "".join(_part(part, where) for part in parts)}
    return number, _text(turn, role, where), _text(turn, content, where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, Mapping) else _kind(part)
        raise BadRow("not text", f"{where}holds {kind}; only text can be learned")
    return _text(part, "text", where)


def _conversation(turns: list[tuple[int, str, str]], roles: Mapping[str, str]) -> Conversation:
    """Checks what chat templates expect: perhaps a system message, then user and assistant in turn."""
    messages: list[Message] = []
    for number, speaker, content in turns:
        role = roles.get(speaker)
        if role is None:
            raise BadRow("unknown role", f"message {number}: {speaker!r} is none of {', '.join(roles)}")
        before = messages[-1]["role"] if messages else "nobody"
        allowed = {
            "nobody": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user",),
        }
        if role not in allowed[before]:
            raise BadRow("roles out of order", f"message {number}: {role} after {before}")
        if role == "assistant" and not content.strip():
            raise BadRow("empty answer", f"message {number}")
        if role == "user" and not content.strip():
            raise BadRow("empty prompt", f"message {number}")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            "roles out of order", f"ends with a message of the {messages[-1]['role']}, not with an answer"
        )
    return Conversation(tuple(messages))


def _filled(row: Row, name: str, empty: str) -> str:
    text = _text(row, name)
    if not text.strip():
        raise BadRow(empty, f"{name!r}")
    return text


def _present(row: Row, name: str, where: str = "") -> Any:
    if row.get(name) is None:
        has = textwrap.shorten(", ".join(repr(key) for key in row), 200, placeholder=" ...") or "nothing"
        raise BadRow("missing field", f"{where}{name!r} (the {'message' if where else 'row'} has {has})")
    return row[name]


def _text(row: Row, name: str, where: str = "") -> str:
    value = _present(row, name, where)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where}{name!r} must be text, it is {_kind(value)}")
    if "\0" in value:
        raise BadRow("NUL character", f"{where}in {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("broken Unicode", f"{where}{name!r} holds half a character (a lone surrogate)") from None
    return value


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
