"""Evaluates the part of Go's text/template that our templates for Ollama use, as Ollama calls it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

_PART = re.compile(r"{{ (.*?) }}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')
_CALLS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}

Names = dict[str, Any]
Block = list[tuple[str, Any]]


def ollama(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Return the prompt: system messages are in `.System`, and among `.Messages` too."""
    system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
    shown = [{name.capitalize(): text for name, text in one.items()} for one in messages]
    parts = _PART.split(template)
    block, rest = _parsed(list(enumerate(parts)))
    assert not rest
    return _run(
        block, {"$": {"System": system, "Messages": shown}, ".": {"System": system, "Messages": shown}}
    )


def _parsed(parts: list[tuple[int, str]]) -> tuple[Block, list[tuple[int, str]]]:
    """Parse up to the next `end` or `else`, which stays the first of the rest."""
    block: Block = []
    while parts:
        (number, text), parts = parts[0], parts[1:]
        if number % 2 == 0:
            block.append(("text", text))
        elif text == "end" or text.startswith("else"):
            return block, [(number, text), *parts]
        elif text.startswith(("if ", "range ")):
            kind, _, head = text.partition(" ")
            branches = []
            while True:
                inner, parts = _parsed(parts)
                branches.append((head, inner))
                (_, closing), parts = parts[0], parts[1:]
                if closing == "end":
                    break
                head = closing.removeprefix("else").strip().removeprefix("if ") or "true"
            block.append((kind, branches))
        else:
            block.append(("value", text))
    return block, []


def _run(block: Block, names: Names) -> str:
    written = []
    for kind, content in block:
        if kind == "text":
            written.append(content)
        elif kind == "value":
            written.append(str(_value(content, names)))
        elif kind == "if":
            chosen = next((inner for head, inner in content if _value(head, names)), [])
            written.append(_run(chosen, names))
        else:
            [(head, inner)] = content
            variables, _, source = head.rpartition(":=")
            number, _, one = (part.strip() for part in variables.partition(","))
            for i, item in enumerate(_value(source, names)):
                written.append(_run(inner, {**names, ".": item, number or "_": i, one or "_": item}))
    return "".join(written)


def _value(text: str, names: Names) -> Any:
    value, rest = _term(_WORD.findall(text), names)
    assert not rest, text
    return value


def _term(words: list[str], names: Names) -> tuple[Any, list[str]]:
    """Evaluate a call with all words up to a closing bracket, or a single word."""
    if words[0] not in _CALLS:
        return _atom(words, names)
    call, words, values = _CALLS[words[0]], words[1:], []
    while words and words[0] != ")":
        value, words = _atom(words, names)
        values.append(value)
    return call(*values), words


def _atom(words: list[str], names: Names) -> tuple[Any, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _term(rest, names)
        assert rest[0] == ")"
        return value, rest[1:]
    if word == "true":
        return True, rest
    if word[0] == '"' or word.isdigit():
        return (int(word) if word.isdigit() else word[1:-1]), rest
    name, _, field = word.partition(".")
    found = names[name or "."]
    return (found[field] if field else found), rest
