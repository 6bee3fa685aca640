"""`qlora check` counts what a run would train, names what it could not check, and fails as a run would."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from commands_for_tests import qlora

from qlora.recipe import Recipe
from qlora.training import check as checking

RecipeFile = Callable[..., Path]


@pytest.fixture
def without_forecast() -> Iterator[None]:
    """Leave out the memory forecast, which takes longer than everything else."""
    no = RuntimeError("not asked for")
    with (
        patch("qlora.memory.run_memory.forecast", side_effect=no),
        patch("qlora.training.check.forecast", side_effect=no),
    ):
        yield


def test_a_good_recipe_is_ok_with_its_numbers(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file(training={"max_steps": None, "epochs": 3})
    done = qlora("check", file)
    assert done.returncode == 0, done.stderr
    verdict, *rest = done.stdout.splitlines()
    assert verdict.startswith("OK: 24 rows, 5 steps an epoch, ")
    assert verdict.endswith("MiB")
    shown = "\n".join(rest)
    assert "24 rows read, 20 trained, 4 held out" in shown
    assert "15 of 4 rows in micro-batches of 2; 5 an epoch, 3 epochs" in shown
    assert "capacity       LoRA of rank 4 on all-linear: 8,192 parameters for " in shown
    assert "advice         none: published comparisons begin at 1B parameters" in shown
    assert "not checked" not in shown
    assert done.stderr.splitlines()[0] == "loading torch and transformers"
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_forecast")
def test_rows_that_are_left_out_are_named(recipe_file: RecipeFile, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(5)]
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in [*good, {"prompt": "?" * 999, "completion": "!"}])
    )
    data = {"source": str(rows), "format": "prompt-completion", "limit": None, "held_out": 1}
    file = recipe_file(data=data)
    done = qlora("check", file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["ok"], found["data"]["counts"]["dropped"], found["unchecked"]) == (True, 1, [])
    assert found["verdict"] == "OK: 5 rows, 1 step an epoch"
    assert "1 row left out: longer than data.max_length=128" in qlora("check", file).stdout


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["optimizer.learning_rate=1"], 2, "did you mean 'lr'?"),
        (
            ["training.max_steps=null", "optimizer.warmup_steps=99"],
            2,
            "must be below the 15 steps of this run",
        ),
        (["data.source=missing.jsonl"], 3, "missing.jsonl"),
        (["data.format=alpaca"], 3, "train.jsonl:1"),
        (["data.template=missing.jinja"], 3, "missing.jinja"),
        (["base.model=/no/such/folder"], 4, "no folder"),
        (["base.model=someone/no-such-model"], 4, "the hub cannot be reached"),
    ],
)
def test_what_is_wrong_is_said_as_a_run_says_it(
    recipe_file: RecipeFile, overrides: list[str], code: int, words: str
) -> None:
    done = qlora("check", recipe_file(training={"epochs": 3}), *overrides)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("without_forecast")
def test_a_config_alone_is_checked_as_far_as_it_goes(
    recipe_file: RecipeFile, tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "config-only"
    shutil.copytree(tiny_llama, base, ignore=shutil.ignore_patterns("*.safetensors"))
    done = qlora("check", recipe_file(base={"model": str(base)}))
    assert done.returncode == 0, done.stderr
    assert f"not checked    the weights: {base} has none, and a run needs them" in done.stdout


@pytest.mark.usefixtures("without_forecast")
def test_a_hub_model_that_is_not_here_is_checked_by_the_packages_config(recipe_file: RecipeFile) -> None:
    base = {"model": "huggyllama/llama-7b", "compute_dtype": "bfloat16"}
    done = qlora("check", recipe_file(base=base, data={"source": "tatsu-lab/alpaca", "limit": None}))
    assert done.returncode == 0, done.stderr
    assert "not checked    the rows: tatsu-lab/alpaca is not a local file" in done.stdout
    assert "not checked    the weights of huggyllama/llama-7b" in done.stdout
    assert "not checked    the tokenizer of huggyllama/llama-7b" in done.stdout


@pytest.mark.usefixtures("without_forecast")
def test_rows_that_are_not_checked_are_named(recipe_file: RecipeFile) -> None:
    done = qlora("check", recipe_file(data={"held_out": "owner/rows"}))
    assert done.returncode == 0
    assert "the rows: owner/rows is not a local file" in done.stdout


@pytest.mark.slow
def test_the_memory_of_a_hub_model_is_forecast_for_full_rows(recipe_file: RecipeFile) -> None:
    base = {"model": "huggyllama/llama-7b", "compute_dtype": "bfloat16"}
    done = qlora("check", recipe_file(base=base, data={"source": "tatsu-lab/alpaca", "limit": None}))
    assert done.returncode == 0, done.stderr
    assert "GiB" in done.stdout.splitlines()[0]
    assert "if every row has 128 tokens" in done.stdout


@pytest.mark.usefixtures("without_forecast")
def test_only_the_first_rows_of_a_large_file_are_read(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "?", "completion": "!"}) + "\n")
    rows.write_text(rows.read_text() * 300 + "not a row\n")
    monkeypatch.setattr(checking, "LARGE_BYTES", 0)
    data = {"source": str(rows), "format": "prompt-completion", "limit": None, "held_out": 250}
    done = qlora("check", recipe_file(data=data))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OK: the first 200 rows\n")
    assert "not checked    the rows after the first 200" in done.stdout
    assert "steps an epoch" not in done.stdout


@pytest.mark.usefixtures("without_forecast")
def test_defaults_prints_the_whole_recipe_and_an_existing_run_is_a_note(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    file = recipe_file()
    done = qlora("check", file, "--defaults", "training.max_steps=7")
    assert done.stdout == Recipe.load(file, ["training.max_steps=7"]).to_yaml()
    assert done.stderr == ""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    done = qlora("check", file)
    assert done.returncode == 0
    assert "already holds a run. Resume it (--resume)" in done.stdout
