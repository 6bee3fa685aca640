"""`qlora data` shows the rows of a data set."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora.cli import app
from qlora.errors import DataError

RecipeFile = Callable[..., Path]


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_trained_tokens_are_marked_without_colour_too(recipe_file: RecipeFile) -> None:
    output = shown(recipe_file(), "--rows", 2)
    assert "\x1b" not in output
    assert output.count("row ") == 2
    for row in output.split("-- document 1: ")[1:]:
        origin, _, text = row.partition("\n")
        assert origin.startswith("bundled/tickets/train.jsonl:")
        assert text.startswith("Question|:|")
        answer = text[text.index("[[") + 2 : text.index("]]")]
        assert answer.replace("|", "").strip().startswith("team: ")
        assert answer.endswith("</s>")
    assert "rows     24 read: 20 to train on, 4 held out, 0 bad" in output


def test_packed_rows_show_the_beginnings_of_documents(recipe_file: RecipeFile) -> None:
    output = shown(recipe_file(), "data.packing=true", "--rows", 1)
    assert "-- document 1: " in output
    assert "-- document 2: " in output
    assert "packing  " in output


def test_json_is_one_object_with_every_token(recipe_file: RecipeFile) -> None:
    output = json.loads(shown(recipe_file(), "--json", "--rows", 1))
    (row,) = output["rows"]
    (document,) = row["documents"]
    trained = "".join(token["text"] for token in document["tokens"] if token["trained"])
    assert trained.strip().startswith("team: ")
    assert trained.endswith("</s>")
    assert output["counts"]["train"] == 20


def test_text_cannot_send_commands_to_the_terminal(recipe_file: RecipeFile, tmp_path: Path) -> None:
    row = {"prompt": "\x1b[31mred [bold]\x07", "completion": "a\nb é"}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 5)
    output = shown(recipe_file(data={"source": str(tmp_path / "a.jsonl"), "format": "prompt-completion"}))
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "\\x1b" in output
    assert "[bold]" in output.replace("|", "")
    assert "\\n\n" in output


def test_a_bad_row_is_an_error_with_its_line(recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')
    file = recipe_file(data={"source": str(tmp_path / "a.jsonl"), "format": "prompt-completion"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: wrong type: 'prompt' must be text"):
        shown(file)


def test_what_is_left_out_is_shown_with_its_line_and_the_lengths_of_all_rows(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "completion": "b " * n} for n in (1, 1, 2, 400)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "c"}\n'
    (tmp_path / "a.jsonl").write_text(text)
    file = recipe_file(
        data={"source": str(tmp_path / "a.jsonl"), "format": "prompt-completion", "held_out": 1}
    )
    output = shown(file, "data.on_bad_row=skip", "data.max_length=128", "--rows", 0)
    assert f"left out {tmp_path}/a.jsonl:5: missing field: 'completion'" in output
    assert re.search(rf"left out {tmp_path}/a\.jsonl:4: \d{{3}} tokens", output)
    bars = re.findall(r"^ +[\d,]+-[\d,]+ +(\d+) #+$", output, re.M)
    assert sum(map(int, bars)) == 4
    assert re.search(r"^ +128 \(now\) +1 rows \(25%\), \d+% of tokens; truncated \d+%$", output, re.M)
    counts = json.loads(shown(file, "data.on_bad_row=skip", "data.max_length=128", "--json"))["counts"]
    assert sum(counts["lengths"].values()) == 4
    assert len(counts["left_out"]) == 2


def test_each_of_several_sources_has_its_line(recipe_file: RecipeFile, tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 2)):
        rows = [{"prompt": f"{name} {n}", "completion": "b"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"source": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 1), ("b", 3))
    ]
    mixed = {"source": None, "sources": sources, "format": "prompt-completion", "held_out": 1}
    output = shown(recipe_file(data=mixed), "--rows", 0)
    pattern = (
        r"^source .*/([ab])\.jsonl: (\d) read, (\d) to train on, (\d) held out, 0 left out, (\d) in an epoch$"
    )
    found = re.findall(pattern, output, re.M)
    assert [source[:2] for source in found] == [("a", "6"), ("b", "2")]
    (a_train, a_held, a_epoch), (b_train, b_held, b_epoch) = (map(int, source[2:]) for source in found)
    assert (a_train + b_train, a_held + b_held) == (7, 1)
    assert (a_epoch, b_epoch) == (2, 5)
