"""`qlora eval`: the loss on rows of another source, base beside adapter, and options that do not fit together."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import Done, qlora
from runs_for_tests import finished_run

from qlora import bundled
from qlora.data import load_dataset
from qlora.model.load import load_tokenizer
from qlora.recipe import Recipe
from qlora.storage import manifest

RecipeFile = Callable[..., Path]


def tickets(numbers: range) -> list[str]:
    lines = bundled.path("bundled/tickets/train.jsonl").read_text().splitlines(keepends=True)
    return [lines[number] for number in numbers]


@pytest.fixture
def recipe(recipe_file: RecipeFile) -> Recipe:
    return Recipe.load(recipe_file())


def evaluated(*arguments: object) -> dict[str, Any]:
    done = qlora("eval", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_loss_on_a_file_of_the_held_out_rows_is_the_held_out_loss(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    held_out = load_dataset(recipe.data, load_tokenizer(recipe.base), recipe.training.seed).held_out
    file = tmp_path / "held_out.jsonl"
    numbers = [int(origin.rpartition(":")[2]) - 1 for origin in held_out.origins]
    file.write_text("".join(line for n in numbers for line in tickets(range(n, n + 1))))
    own, other = evaluated(run), evaluated(run, "--data", file, "--with-base")
    assert (other["eval_loss"], other["eval_tokens"]) == (own["eval_loss"], own["eval_tokens"])
    assert (other["rows"], other["rows_read"], other["rows_left_out"]) == (4, 4, {})
    assert other["base"] == evaluated(run, "--base")
    assert other["base"]["eval_loss"] != own["eval_loss"]


def test_other_formats_and_columns_can_be_read(recipe_file: RecipeFile, tmp_path: Path) -> None:
    run = finished_run(Recipe.load(recipe_file(data={"columns": {"messages": "messages"}})))
    (tmp_path / "rows.csv").write_text("question,reply\nOne?,1\nTwo?,2\nThree?,3\n")
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{a}?", "completion": b}) + "\n"
            for a, b in (("One", "1"), ("Two", "2"), ("Three", "3"))
        )
    )
    columns = ["--column", "prompt=question", "--column", "completion=reply"]
    first = evaluated(run, "--data", tmp_path / "rows.csv", "--format", "prompt-completion", *columns)
    second = evaluated(run, "--data", tmp_path / "rows.jsonl", "--format", "prompt-completion")
    assert first["eval_loss"] == second["eval_loss"]
    assert (first["rows"], first["format"]) == (3, "prompt-completion")
    text = tmp_path / "rows.txt"
    text.write_text("One line.\nAnother line.\n")
    assert evaluated(run, "--data", text, "--format", "text")["rows"] == 2


def test_a_recipe_with_several_sources_lends_the_settings_of_the_first(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(tickets(range(5))))
    source = {"source": str(file), "format": "messages"}
    data = {"source": None, "format": "alpaca", "sources": [source, {"source": str(file)}], "limit": 3}
    run = finished_run(Recipe.load(recipe_file(data=data)))
    assert evaluated(run, "--data", file)["rows"] == 5, "the limit of the recipe is not that of these rows"


def test_rows_that_are_left_out_are_named(recipe: Recipe, tmp_path: Path) -> None:
    run, file = finished_run(recipe), tmp_path / "rows.jsonl"
    file.write_text("".join(tickets(range(12))))
    found = evaluated(run, "--data", file, "--max-length", "40")
    assert 0 < found["rows"] < 12
    assert found["rows_left_out"] == {"dropped": 12 - found["rows"]}
    done = qlora("eval", run, "--data", file, "--max-length", "40")
    assert f"note  {12 - found['rows']} rows left out: longer than --max-length 40" in done.stderr


def test_training_rows_among_them_are_counted_if_the_cache_has_them(recipe: Recipe, tmp_path: Path) -> None:
    run, file = finished_run(recipe), tmp_path / "rows.jsonl"
    file.write_text("".join(tickets(range(20, 30))))
    training = load_dataset(recipe.data, load_tokenizer(recipe.base), recipe.training.seed)
    manifest.write(run / "adapter", data=training.fingerprint)
    seen = sum(int(origin.rpartition(":")[2]) > 20 for origin in training.train.origins)
    assert 0 < seen <= 4
    done = qlora("eval", run, "--data", file)
    assert f"note  {seen} of 10 rows are training rows of this run" in done.stderr
    (run / "adapter/manifest.json").unlink()
    manifest.write(run / "adapter", data="of other rows")
    assert evaluated(run, "--data", file)["rows_seen_in_training"] is None


def refused(*arguments: object) -> Done:
    done = qlora("eval", "no/run", *arguments)
    assert done.returncode == 2, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "--with-base"], "--base and --with-base cannot be used together"),
        (["--data", "x", "--tasks", "y"], "--data and --tasks cannot be used together"),
        (["--format", "text"], "--format, --column, --split, --max-length and --on-bad-row are for"),
        (["--data", "x", "--column", "prompt"], "'prompt' is not FIELD=COLUMN"),
        (["--limit", "3"], "are for --tasks; add it"),
        (["--chat-template"], "are for --tasks; add it"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str) -> None:
    text = " ".join(refused(*arguments).stderr.replace("│", " ").split())
    assert message in text


def test_wrong_rows_are_named(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    missing = qlora("eval", run, "--data", tmp_path / "no.jsonl")
    assert missing.returncode == 3
    assert (
        missing.stderr.splitlines()[-1] == f"qlora: --data: '{tmp_path}/no.jsonl': No such file or directory"
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    done = qlora("eval", run, "--data", tmp_path / "rows.jsonl", "--format", "alpacca")
    assert done.returncode == 2
    assert "qlora: --format: must be alpaca," in done.stderr
    done = qlora("eval", run, "--data", tmp_path / "rows.jsonl", "--split", "test")
    assert done.returncode == 2
    assert "qlora: --split: " in done.stderr
    done = qlora("eval", run, "--data", tmp_path / "rows.jsonl")
    assert done.returncode == 3
    assert f"{tmp_path}/rows.jsonl:1" in done.stderr
    assert "set --column FIELD=COLUMN" in done.stderr
    assert "choose another --format." in done.stderr
    assert "Correct the rows, or skip them with --on-bad-row skip" in done.stderr
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n' + "".join(tickets(range(2))))
    found = evaluated(run, "--data", tmp_path / "rows.jsonl", "--on-bad-row", "skip")
    assert (found["rows"], found["rows_left_out"]) == (2, {"bad": 1})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    done = qlora("eval", run, "--data", tmp_path / "rows.jsonl")
    assert "looks like --format prompt-completion; set that" in done.stderr
    (tmp_path / "rows.jsonl").write_text("")
    done = qlora("eval", run, "--data", tmp_path / "rows.jsonl")
    assert f"{tmp_path}/rows.jsonl: the source has no rows. Give a source with rows" in done.stderr
    assert "data." not in done.stderr.replace("data.jsonl", "")


def test_a_missing_harness_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (line,) = refused("--tasks", "x").stderr.splitlines()
    assert line.startswith("qlora: --tasks needs lm-evaluation-harness (import of lm_eval halted")
    assert line.endswith("install it with `pip install 'qlora-train[eval]'`")
