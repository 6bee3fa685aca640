"""The start and the end of a run say what is trained, left out, resumed and written."""

import html
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from commands_for_tests import qlora
from runs_for_tests import stop_after

from qlora.cli.train import MEANINGS, report
from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.report.facts import RunFacts
from qlora.training.result import TrainResult
from qlora.training.run_folder import CONTENTS
from qlora.training.train import train

RecipeFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _without_forecast() -> Iterator[None]:
    """Leave out the memory forecast, which takes longer than these runs."""
    with patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")):
        yield


def run(file: Path, *overrides: str, **kwargs: bool) -> TrainResult:
    return train(Recipe.load(file, overrides), **{"terminal": False, **kwargs})


@pytest.fixture
def rows_of_all_kinds(tmp_path: Path) -> Path:
    """Return a file of 30 rows: 20 good ones, 6 that are too long, 4 without an answer."""
    file = tmp_path / "rows.jsonl"
    good = [{"prompt": f"Number {n}?", "completion": f"{n}!"} for n in range(20)]
    long = [{"prompt": "Count to many. " * 20, "completion": f"{n}"} for n in range(6)]
    bad = [{"prompt": f"{n}"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*good, *long, *bad]))
    return file


def test_a_run_says_first_what_it_trains_and_what_it_leaves_out(
    recipe_file: RecipeFile, rows_of_all_kinds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        "source": str(rows_of_all_kinds), "format": "prompt-completion", "max_length": 48, "limit": None,
        "on_bad_row": "skip",
    }  # fmt: skip
    outcome = run(recipe_file(data=data), terminal=True)
    header, _, rest = capsys.readouterr().err.partition("step 0  held-out loss")
    assert rest, "the header must come before the first evaluation"
    for words in (
        "30 rows read, 16 trained, 4 held out",
        "6 rows left out: longer than data.max_length=48",
        "4 rows left out, because they cannot be used: 4 missing field",
        "LoRA of rank 4 on all-linear",
        "4 of 4 rows in micro-batches of 2; 4 an epoch, 1 epoch",
        "no memory forecast for ",
        "RuntimeError in ",
        f"output         {outcome.run}",
    ):
        assert words in header
    assert not [line for line in header.splitlines() if line != line.rstrip()]
    assert outcome.facts is not None
    facts = RunFacts.from_json(outcome.facts)
    assert facts.as_json() == outcome.facts == json.loads((outcome.run / "facts.json").read_text())
    assert outcome.facts == json.loads((outcome.run / "result.json").read_text())["facts"]
    assert facts.data.counts["reasons"] == {"missing field": 4}
    assert facts.base.parameters == 336_192, "NF4 stores two weights in a byte"
    assert {"qlora", "python", "torch", "transformers"} <= facts.session.versions.keys()
    page = html.unescape((outcome.run / "report.html").read_text())
    for label, text in facts.rows():
        assert f"<dt>{label}</dt><dd>{text}</dd>" in page
    assert [row for row in facts.rows() if row[0] in ("software", "hardware", "command", "began")]


def test_a_stopped_run_names_its_files_and_a_resumed_run_reports_the_whole(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(optimizer={"schedule": "cosine"})
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        first = run(file)
    assert (first.steps, first.result) == (2, None)
    names = {path.name for path in first.run.iterdir() if not path.name.startswith(".")}
    lines = report(first).splitlines()
    assert f"files          {first.run}/" in lines
    assert names == {line.split()[0].rstrip("/") for line in lines if line.startswith("  ")}
    assert set(MEANINGS) == set(CONTENTS)
    resumed = run(file, "training.max_steps=6", resume=True, terminal=True)
    shown = capsys.readouterr().err
    assert "resuming from step 2 of 6" in shown
    assert "the run had 4 steps before and has 6 now, so the learning rate changes its course" in shown
    assert f"({first.loss_before:.4f} at step 0)" in shown
    assert "nothing to resume" not in shown
    assert resumed.loss_before == first.loss_before
    assert resumed.steps == 6
    assert resumed.seconds > first.seconds > 0


def test_resume_without_a_run_and_of_a_finished_run_is_not_silent(
    recipe_file: RecipeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(training={"max_steps": None, "epochs": 1})
    first = run(file, resume=True, terminal=True)
    missing = f"nothing to resume: {tmp_path / 'run'} holds no run, so this run starts at step 0"
    assert missing in capsys.readouterr().err
    assert run(file, resume=True, terminal=True) == first
    assert "the run is finished (5 steps); nothing is left to train" in capsys.readouterr().err
    assert run(file, "training.max_steps=5", resume=True) == first, "the same length in other words"
    for change, words in {
        "training.max_steps=3": r"finished after 5 steps.*training\.max_steps=3 \(3 steps\).*shorter.*--fresh",
    }.items():
        with pytest.raises(RecipeError, match=words):
            run(file, change, resume=True)
    old = json.loads((first.run / "result.json").read_text())
    del old["facts"], old["sha256"]  # as in an earlier version
    (first.run / "result.json").write_text(json.dumps(old))
    assert run(file, resume=True).steps == 5
    assert run(file, "training.epochs=2", resume=True).steps == 10


def test_a_run_is_not_resumed_to_fewer_steps_than_it_has(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file()
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        run(file)
    with pytest.raises(RecipeError, match=r"has taken 3 steps, and this recipe ends after 2.*--fresh"):
        run(file, "training.max_steps=2", resume=True)
    ended = run(file, "training.max_steps=3", resume=True)
    assert ended.result is not None
    assert ended.loss_after != ended.loss_before, "the loss after training must be computed"


def test_a_warm_up_longer_than_the_epochs_is_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file(training={"max_steps": None, "epochs": 1}, optimizer={"warmup_steps": 5})
    with pytest.raises(RecipeError, match=r"warmup_steps \(5\) must be below the 5 steps of this run"):
        run(file)
    assert not (tmp_path / "run" / "run.json").exists()


def test_quiet_prints_the_result_alone(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file()
    done = qlora("train", file, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'run' / 'adapter'}\n", "")
    assert qlora("train", file, "-q", "-v").returncode == 2
