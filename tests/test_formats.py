"""Rows of every format, and every reason to refuse a row."""

import json
from pkgutil import iter_modules
from typing import Any

import pytest

from qlora import formats
from qlora.errors import DataError
from qlora.formats import FORMATS, BadRow, Completion, Conversation, NotTrained
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
    assert files - set(FORMATS) == {"format", "tool-calls", "turns", "values", "weights"}
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
    ("messages", chat(QUESTION), "no answer: no message is the assistant's"),
    (
        "messages",
        {**chat(QUESTION), "chosen": ANSWER, "rejected": ANSWER},
        "preference data: the answers are in 'chosen' and 'rejected'",
    ),
    (
        "messages",
        chat(QUESTION, {**ANSWER, "role": "judge"}),
        "unknown role: message 2: 'judge' is not one of",
    ),
    ("messages", chat(QUESTION, {**ANSWER, "content": None}), "missing field: message 2: 'content' is null"),
    (
        "messages",
        chat(QUESTION, {**ANSWER, "weight": 0.5}),
        "unknown weight: message 2: weight: 0.5; use 0 or 1",
    ),
    ("messages", chat({**QUESTION, "train": True}, ANSWER), "weight of a question: message 1: train: True"),
    (
        "messages",
        chat({**QUESTION, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER),
        "wrong role: message 1",
    ),
    (
        "messages",
        {**chat(SYSTEM, QUESTION, ANSWER), "system": "Be long."},
        "two system messages: in the column",
    ),
    (
        "messages",
        {**chat(QUESTION, ANSWER), "images": ["1.jpg"]},
        "not text: 'images'; only text is supported",
    ),
    ("messages", {**chat(QUESTION, ANSWER), "tools": "[{"}, "broken JSON: 'tools'"),
    (
        "messages",
        {**chat(QUESTION, ANSWER), "tools": [{"type": "function"}]},
        "unknown tools: 'tools', entry 1",
    ),
    (
        "messages",
        chat({**QUESTION, "content": [{"type": "text"}]}, ANSWER),
        "missing field: message 1: part 1: 'text' or 'value' (the part has 'type')",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": ["c"]},
        "wrong type: 'history', entry 1: must be [question",
    ),
    ("messages", chat(QUESTION, {**ANSWER, "content": ""}), "empty answer: message 2"),
    ("messages", chat({**QUESTION, "content": " "}, ANSWER), "empty prompt: message 1"),
    (
        "messages",
        chat(QUESTION, {"role": "assistant"}),
        "missing field: message 2: 'content' (the message has 'role')",
    ),
    ("messages", chat(QUESTION, {**ANSWER, "content": 4}), "wrong type: message 2: 'content' must be text"),
    ("messages", chat(QUESTION, {**ANSWER, "content": "\0"}), "NUL character: in message 2: 'content'"),
    (
        "messages",
        chat(QUESTION, {**ANSWER, "tool_calls": [1]}),
        "unknown tool call: message 2: must have a name",
    ),
    (
        "messages",
        chat({**QUESTION, "content": [{"type": "image"}]}, ANSWER),
        "not text: message 1: part 1: is 'image'",
    ),
    ("messages", {"messages": ["hi"]}, "wrong type: message 1: must be an object"),
    (
        "sharegpt",
        {"conversations": [{"from": "dog", "value": "wow"}]},
        "unknown role: message 1: 'dog' is not one of",
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


def unused(format: str, row: dict[str, Any]) -> tuple[str, ...]:
    return parse(format, row).unused


def test_columns_and_message_keys_that_nothing_reads_are_named() -> None:
    row = {"instruction": "a", "output": "b", "text": "ab", "id": 7, "empty": "", "note": None, "tags": []}
    assert unused("alpaca", row) == ("column text", "column id")
    assert unused("messages", chat({**QUESTION, "speaker": "Ann"}, ANSWER)) == ("message key speaker",)
    assert unused("completion", {"text": "a", "label": 0}) == ("column label",)
    assert unused("prompt-completion", {"prompt": "a", "completion": "b", "system": "c"}) == (
        "column system",
    )
    assert unused("messages", {**chat(QUESTION, ANSWER), "weight": 72.5}) == ("column weight",)
    assert unused("messages", chat(SYSTEM, QUESTION, ANSWER)) == ()


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"loss_weight": 0.0}])
def test_an_answer_without_weight_is_context(mark: dict[str, Any]) -> None:
    content = parse("messages", chat(QUESTION, {**ANSWER, **mark}, QUESTION, {**ANSWER, "weight": 1}))
    assert isinstance(content, Conversation)
    assert content.trained == [3]
    with pytest.raises(NotTrained, match="every answer has weight 0"):
        parse("messages", chat(QUESTION, {**ANSWER, **mark}))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"label": False}])
@pytest.mark.parametrize("format", ["messages", "alpaca", "prompt-completion"])
def test_a_row_without_weight_is_not_trained(mark: dict[str, Any], format: str) -> None:
    rows = {
        "messages": chat(QUESTION, ANSWER),
        "alpaca": {"instruction": "a", "output": "b"},
        "prompt-completion": {"prompt": "a", "completion": "b"},
    }
    with pytest.raises(NotTrained):
        parse(format, {**rows[format], **mark})
    assert parse(format, {**rows[format], "label": True, "train": True, "weight": 1}).unused == ()
    assert parse(format, {**rows[format], "label": 0}).unused == ("column label",)  # a class, not a judgement


def test_columns_beside_a_conversation() -> None:
    tool = {"name": "f", "parameters": {}}
    row = {
        "instruction": "c",
        "output": "d",
        "system": "Be brief.",
        "history": [["a", "b"]],
        "tools": json.dumps([tool]),
    }
    content = parse("alpaca", row)
    assert isinstance(content, Conversation)
    assert turns(content) == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    assert content.tools == ({"type": "function", "function": tool},)
    marked = parse(
        "messages", {**chat({**QUESTION}, {**ANSWER, "weight": 0}, QUESTION, ANSWER), "system": "Be brief."}
    )
    assert isinstance(marked, Conversation)
    assert marked.trained == [4]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    "message",
    [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}],
        },
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 2}'}},
        {"role": "function_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
        {
            "role": "assistant",
            "content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'}],
        },
    ],
)
def test_tool_calls_in_every_layout(message: dict[str, Any]) -> None:
    result = {"role": "tool", "content": "4", "tool_call_id": "1"}
    content = parse("messages", chat(QUESTION, message, result, ANSWER))
    assert isinstance(content, Conversation)
    assert content.messages[1:3] == ({"role": "assistant", "content": "", "tool_calls": [CALL]}, result)
    assert content.trained == [1, 3]
    said = [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(CALL)}]
    said += [{"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}]
    shared = parse("sharegpt", {"conversations": said})
    assert isinstance(shared, Conversation)
    assert shared.messages[1] == content.messages[1]


def test_reasoning_in_every_layout() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        content = parse("messages", chat(QUESTION, {**ANSWER, key: "two and two"}))
        assert isinstance(content, Conversation)
        assert content.messages[1] == {**ANSWER, "reasoning_content": "two and two"}
    parts = [{"type": "reasoning", "value": "two and two"}, {"type": "text", "value": "4"}]
    assert parse("messages", chat(QUESTION, {**ANSWER, "content": parts})) == content


def test_message_lists_in_every_layout() -> None:
    expected = parse("messages", chat(QUESTION, ANSWER))
    columns = {"role": ["user", "assistant"], "content": ["2+2?", "4"]}
    assert parse("messages", {"messages": columns}) == expected
    halves = parse("prompt-completion", {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]})
    assert isinstance(halves, Conversation)
    assert halves.trained == [3]


def test_the_order_of_roles_is_free() -> None:
    content = parse("messages", chat(ANSWER, QUESTION, QUESTION, ANSWER, ANSWER, QUESTION))
    assert isinstance(content, Conversation)
    assert content.trained == [0, 3, 4]
    developer = parse("messages", chat({"role": "developer", "content": "Be brief."}, QUESTION, ANSWER))
    assert turns(developer)[0] == ("system", "Be brief.")


def test_marks_in_a_csv_file_are_text() -> None:
    row = {"prompt": "a", "completion": "b"}
    for mark in ({"weight": "0"}, {"train": "false"}, {"label": "False"}, {"loss_mask": "0.0"}):
        with pytest.raises(NotTrained):
            parse("prompt-completion", {**row, **mark})
    assert parse("prompt-completion", {**row, "weight": "1", "train": "true"}).unused == ()
    assert parse("prompt-completion", {**row, "weight": "72.5"}).unused == ("column weight",)
    with pytest.raises(NotTrained):
        parse("text", {"text": "a", "weight": 0})
    assert parse("text", {"text": "a", "label": False}).unused == ("column label",)


def test_nothing_of_a_call_is_dropped() -> None:
    call = {
        "role": "function_call",
        "content": json.dumps(CALL["function"]),
        "reasoning": "two and two",
        "name": "me",
    }
    content = parse("messages", chat(QUESTION, call, {"role": "tool", "content": "4"}, ANSWER))
    assert isinstance(content, Conversation)
    assert content.messages[1]["reasoning_content"] == "two and two"
    assert content.messages[1]["name"] == "me"
    with pytest.raises(BadRow, match="two thoughts"):
        parse("messages", chat(QUESTION, {**ANSWER, "reasoning": "a", "thinking": "b"}))
