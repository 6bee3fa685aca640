"""Sample answers show the conversation that they continue: in the record, the terminal and the report."""

import io
import json
from pathlib import Path

from rich.console import Console
from tokenizers_for_tests import byte_level

from qlora.data.layout import Layout
from qlora.data.transcript import transcript
from qlora.recipe import Data
from qlora.report import samples
from qlora.tracking.record import Record
from qlora.tracking.sink import Sample
from qlora.tracking.terminal import Lines, Pace

TURNS = [("system", "Be\nbrief."), ("user", "Where is it?"), ("assistant", "In the hall."), ("user", "Sure?")]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def test_a_held_out_question_comes_with_the_messages_before_it() -> None:
    layout = Layout(Data(source="-", format="messages", template="plain"), byte_level())
    content = layout.read({"messages": messages([*TURNS, ("assistant", "Yes.")])})
    question = layout.question(content)
    assert (question.text, question.reference) == ("Sure?", "Yes.")
    assert question.before == "system: Be brief.\nuser: Where is it?\nassistant: In the hall."
    single = layout.question(layout.read({"messages": messages([("user", "Hi"), ("assistant", "Yes.")])}))
    assert single.before == ""


def test_a_long_conversation_is_shortened() -> None:
    lines = transcript(messages([("user", str(number)) for number in range(9)])).split("\n")
    assert lines == ["(3 earlier messages)", *(f"user: {number}" for number in range(3, 9))]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    assert transcript([call, {"role": "tool", "content": "x" * 300}]).split("\n") == [
        "assistant: (calls add)",
        f"tool: {'x' * 200} …",
    ]


def test_terminal_record_and_report_show_it(tmp_path: Path) -> None:
    sample = Sample("Sure?", "Yes.", "No.", before="user: Where is it?\nassistant: In the hall.")
    file = io.StringIO()
    Lines(Console(file=file, width=100), Pace(1)).samples([sample, Sample("Hi", "Yes.", "No.")], 0)
    shown = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    three = ["prompt", "expected", "answer"]
    assert [line[0] for line in shown] == ["before", *three, *three]
    assert "In the hall." in " ".join(shown[0])

    record = Record(tmp_path / "metrics.jsonl", 0)
    record.samples([sample], 0)
    record.finish({})
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert samples.prompts([line])[0].before == sample.before
    del line["samples"][0]["before"]  # a run of an older version
    assert samples.prompts([line])[0].before == ""
