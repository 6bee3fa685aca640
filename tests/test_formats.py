"""Rows of every format, and every reason to refuse a row."""

from pkgutil import iter_modules
from typing import Any

import pytest

from qlora import formats
from qlora.errors import DataError
from qlora.formats import FORMATS, BadRow, Completion, Conversation
from qlora.recipe import Recipe

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def parse(format: str, row: dict[str, Any], **columns: str) -> Conversation | Completion:
    return FORMATS[format].parser(columns)(row)


def turns(content: Conversation | Completion) -> list[tuple[str, str]]:
    assert isinstance(content, Conversation)
    return [(message["role"], message["content"]) for message in content.messages]


def test_every_file_with_a_format_is_in_the_registry_under_its_name() -> None:
    files = {info.name.replace("_", "-") for info in iter_modules(formats.__path__)}
    assert files - set(FORMATS) == {"format", "turns", "values"}
    assert all(name == format.name for name, format in FORMATS.items())


@pytest.mark.parametrize("format", FORMATS)
def test_a_recipe_takes_every_format_and_its_fields(format: str) -> None:
    assert list(FORMATS) == Recipe.json_schema()["$defs"]["Data"]["properties"]["format"]["enum"]
    columns = dict.fromkeys(FORMATS[format].fields, "another")
    data = {"source": "some/data", "format": format, "columns": columns}
    assert Recipe.from_dict({"base": {"model": "some/model"}, "data": data}).data.columns == columns


def test_alpaca() -> None:
    with_input = parse("alpaca", {"instruction": "Add.", "input": "2+2", "output": "4", "text": 7})
    assert turns(with_input) == [("user", "Add.\n\n2+2"), ("assistant", "4")]
    assert isinstance(with_input, Conversation)
    assert with_input.messages[0] == {**with_input.messages[0], "instruction": "Add.", "input": "2+2"}
    for empty in ({"input": ""}, {"input": " \n"}, {"input": None}, {}):
        without = parse("alpaca", {"instruction": "Add.", "output": "4", **empty})
        assert turns(without) == [("user", "Add."), ("assistant", "4")]


def test_messages() -> None:
    row = {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER, QUESTION, ANSWER]}
    assert turns(parse("messages", row)) == [("system", ""), *[("user", "2+2?"), ("assistant", "4")] * 2]


def test_message_content_in_parts_as_openai_writes_it() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    assert turns(parse("messages", row)) == [("user", "2+2?"), ("assistant", "4")]


def test_sharegpt() -> None:
    said = [("system", "Be brief."), ("human", "2+2?"), ("gpt", "4"), ("user", "sure?"), ("chatgpt", "Yes.")]
    row = {"id": 7, "conversations": [{"from": speaker, "value": text} for speaker, text in said]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert turns(parse("sharegpt", row)) == list(zip(roles, (text for _, text in said), strict=True))


def test_messages_in_a_csv_cell() -> None:
    row = {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'}
    assert turns(parse("messages", row)) == [("user", "2+2?"), ("assistant", "4")]


def test_prompt_completion_and_plain_text_are_kept_unchanged() -> None:
    assert parse("prompt-completion", {"prompt": " a ", "completion": "\nb"}) == Completion(" a ", "\nb")
    for plain in ("completion", "text"):
        assert parse(plain, {"text": " a b\n"}) == Completion("", " a b\n")


def test_columns_can_have_other_names() -> None:
    row = {"question": "2+2?", "answer": "4"}
    assert parse("prompt-completion", row, prompt="question", completion="answer") == Completion("2+2?", "4")
    assert turns(parse("alpaca", row, instruction="question", output="answer"))[1] == ("assistant", "4")
    assert turns(parse("messages", {"chat": [QUESTION, ANSWER]}, messages="chat"))[1] == ("assistant", "4")


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_for_an_unknown_field_lists_the_known_fields(format: str) -> None:
    with pytest.raises(DataError, match=f"no field 'promt'; its fields are {FORMATS[format].fields[0]}"):
        FORMATS[format].parser({"promt": "question"})


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


SYSTEM = {"role": "system", "content": "Be brief."}
BAD = [
    ("alpaca", {}, "missing field: 'instruction' (the row has nothing)"),
    (
        "alpaca",
        {"instruction": "a", "input": ""},
        "missing field: 'output' (the row has 'instruction', 'input')",
    ),
    ("alpaca", {"instruction": "a", "output": None}, "missing field: 'output'"),
    ("alpaca", {"instruction": "a", "output": " \n"}, "empty answer: 'output'"),
    ("alpaca", {"instruction": "", "output": "b"}, "empty prompt: 'instruction'"),
    (
        "alpaca",
        {"instruction": "a", "input": 3, "output": "b"},
        "wrong type: 'input' must be text, not a number",
    ),
    ("alpaca", {"instruction": "a", "output": ["b"]}, "wrong type: 'output' must be text, not a list"),
    ("prompt-completion", {"prompt": "a", "completion": ""}, "empty answer"),
    ("prompt-completion", {"prompt": "", "completion": "b"}, "empty prompt"),
    (
        "prompt-completion",
        {"prompt": "a", "completion": True},
        "wrong type: 'completion' must be text, not true",
    ),
    ("completion", {"text": "a\0b"}, "NUL character: in 'text'"),
    ("completion", {"text": "a\ud800b"}, "broken Unicode: 'text' contains half a character"),
    ("completion", {"text": "\t"}, "empty text"),
    ("messages", {"messages": "hi"}, "wrong type: 'messages' must be a list of messages, not text"),
    ("messages", {"messages": "[{"}, "broken JSON: in 'messages'"),
    ("messages", {"messages": []}, "empty conversation"),
    ("messages", chat(QUESTION), "roles out of order: ends with a user message, not with an answer"),
    (
        "messages",
        chat(ANSWER, QUESTION, ANSWER),
        "roles out of order: message 1: assistant as the first message",
    ),
    ("messages", chat(QUESTION, QUESTION, ANSWER), "roles out of order: message 2: user after user"),
    ("messages", chat(QUESTION, ANSWER, ANSWER), "roles out of order: message 3: assistant after assistant"),
    ("messages", chat(QUESTION, SYSTEM, ANSWER), "roles out of order: message 2: system after user"),
    ("messages", chat(SYSTEM, ANSWER), "roles out of order: message 2: assistant after system"),
    ("messages", chat(QUESTION, {**ANSWER, "role": "tool"}), "unknown role: message 2: 'tool' is not one of"),
    ("messages", chat(QUESTION, {**ANSWER, "content": ""}), "empty answer: message 2"),
    ("messages", chat({**QUESTION, "content": " "}, ANSWER), "empty prompt: message 1"),
    (
        "messages",
        chat(QUESTION, {"role": "assistant"}),
        "missing field: message 2: 'content' (the message has 'role')",
    ),
    ("messages", chat(QUESTION, {**ANSWER, "content": 4}), "wrong type: message 2: 'content' must be text"),
    ("messages", chat(QUESTION, {**ANSWER, "content": "\0"}), "NUL character: message 2: in 'content'"),
    ("messages", chat(QUESTION, {**ANSWER, "tool_calls": [1]}), "tool call: message 2"),
    (
        "messages",
        chat({**QUESTION, "content": [{"type": "image"}]}, ANSWER),
        "not text: message 1: contains 'image'",
    ),
    ("messages", {"messages": ["hi"]}, "wrong type: message 1: must be an object"),
    (
        "sharegpt",
        {"conversations": [{"from": "dog", "value": "wow"}]},
        "unknown role: message 1: 'dog' is not one of",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "hi"}]},
        "roles out of order: message 1: assistant as the first",
    ),
    ("sharegpt", {"conversation": []}, "missing field: 'conversations' (the row has 'conversation')"),
]


@pytest.mark.parametrize(("format", "row", "reason"), BAD)
def test_errors_for_bad_rows_name_the_problem_and_the_place(
    format: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRow) as raised:
        parse(format, row)
    assert str(raised.value).startswith(reason)
    assert raised.value.kind == reason.partition(":")[0]
