"""`qlora data` shows the rows of a data set."""

import json
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
