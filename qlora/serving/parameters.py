"""Parameters of a request: read, checked, and refused if they would have no effect here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora.serving.api_error import ApiError

Message = Mapping[str, str]

CHAT = frozenset({"messages", "max_completion_tokens"})
COMPLETION = frozenset({"prompt"})
BOTH = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user"}
)
# `user` names the person who asks, for statistics of a provider; it changes no answer anywhere.

WITHOUT_EFFECT: dict[str, list[Any]] = {
    "n": [1], "presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}], "logprobs": [False],
    "top_logprobs": [0], "tools": [[]], "functions": [[]], "tool_choice": ["none"], "store": [False], "metadata": [{}],
    "response_format": [{"type": "text"}], "modalities": [["text"]], "service_tier": ["auto", "default"],
    "echo": [False], "best_of": [1], "suffix": [""],
}  # fmt: skip
"""values with which a parameter that is not supported asks for nothing; any other is refused"""

MOST_STOPS = 4
DEFAULT_COMPLETION_TOKENS = 16
"""length of a completion whose request does not say, as OpenAI documents it"""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Wanted:
    """A request that has been checked, as far as that needs no model."""

    model: str
    messages: tuple[Message, ...]
    """the conversation; empty for a completion"""
    prompt: str
    """the text to continue; empty for a conversation"""
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(body: bytes) -> dict[str, Any]:
    """Parse the JSON object of a request. Raises ApiError."""
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    return fields


def read(fields: Mapping[str, Any], *, chat: bool) -> Wanted:
    """Check the parameters of a chat or a completion. Raises ApiError for the first that is wrong or not supported."""
    given = {name: value for name, value in fields.items() if value is not None}
    known = BOTH | (CHAT if chat else COMPLETION)
    for name in given.keys() - known:
        _check_without_effect(name, given[name])
    for name in ("model", "messages" if chat else "prompt"):
        if name not in given:
            raise ApiError(400, f"{name} is missing", param=name)
    stream = _boolean(given, "stream")
    limits = {
        name: _integer(given, name, 1) for name in ("max_tokens", "max_completion_tokens") if name in given
    }
    if len(set(limits.values())) > 1:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ; leave max_tokens out", param="max_tokens"
        )
    return Wanted(
        model=_string(given, "model"),
        messages=_messages(given["messages"]) if chat else (),
        prompt="" if chat else _prompt(given["prompt"]),
        max_tokens=next(iter(limits.values()), None if chat else DEFAULT_COMPLETION_TOKENS),
        temperature=_number(given, "temperature", 2),
        top_p=_number(given, "top_p", 1),
        seed=_integer(given, "seed", -(2**63), 2**63 - 1) if "seed" in given else None,
        stop=_stop(given.get("stop", [])),
        stream=stream,
        include_usage=_usage(given.get("stream_options"), stream),
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _check_without_effect(name: str, value: Any) -> None:
    allowed = WITHOUT_EFFECT.get(name, [])
    if not any(type(value) is type(each) and value == each for each in allowed) and not (
        isinstance(value, float) and value in allowed
    ):
        only = f" other than {json.dumps(allowed[0])}" if allowed else ""
        raise ApiError(
            400,
            f"parameter {shown(name)}{only} is not supported here, and nothing is ignored; leave it out",
            param=name[:100].encode(errors="replace").decode(),
            code="unsupported_parameter",
        )


def shown(text: str, most: int = 60) -> str:
    """Return a text of others as one short quoted word for a message."""
    return repr(text if len(text) <= most else text[:most] + "…")


def _string(given: Mapping[str, Any], name: str) -> str:
    if not isinstance(given[name], str):
        raise ApiError(400, f"{name} must be a string", param=name)
    return str(given[name])


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def _number(given: Mapping[str, Any], name: str, most: float) -> float:
    """Return a number from 0 to `most`; 1 if it is not given."""
    value = given.get(name, 1)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= most):  # not true for NaN
        raise ApiError(400, f"{name} must be a number from 0 to {most:g}", param=name)
    return float(value)


def _integer(given: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int:
    value = given[name]
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        size = f"at least {least}" if most is None else "in 64 bits"
        raise ApiError(400, f"{name} must be a whole number, {size}", param=name)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    sequences = [value] if isinstance(value, str) else value
    if not (
        isinstance(sequences, list)
        and len(sequences) <= MOST_STOPS
        and all(isinstance(each, str) and each for each in sequences)
    ):
        raise ApiError(
            400, f"stop must be a string or up to {MOST_STOPS} strings, none of them empty", param="stop"
        )
    return tuple(sequences)


def _usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise ApiError(400, "stream_options can have include_usage only", param="stream_options")
    return _boolean(options, "include_usage")


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ApiError(
            400, "prompt must be one string; tokens and several prompts are not supported", param="prompt"
        )
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not (isinstance(value, list) and value):
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    messages = tuple(_message(each, f"messages[{number}]") for number, each in enumerate(value))
    if messages[-1]["role"] != "user":
        raise ApiError(
            400, "the last message must have the role user; the answer follows it", param="messages"
        )
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ApiError(400, f"{place} must be an object with role and content", param=place)
    value = {name: each for name, each in value.items() if each is not None}
    for name in value.keys() - {"role", "content"}:
        raise ApiError(400, f"{place}: {shown(name)} is not supported; leave it out", param=place)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{place}: role must be one of {', '.join(ROLES)}", param=place)
    return {"role": ROLES[role], "content": _content(value.get("content"), place)}


def _content(value: Any, place: str) -> str:
    """Return the text of a message: a string, or parts of type text joined."""
    if isinstance(value, str):
        return value
    texts = []
    for part in value if isinstance(value, list) else [value]:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ApiError(
                400, f"{place}: content must be text, or a list of parts of type text", param=place
            )
        if part.keys() != {"type", "text"}:
            raise ApiError(400, f"{place}: a part of type text can have nothing but its text", param=place)
        texts.append(part["text"])
    return "".join(texts)
