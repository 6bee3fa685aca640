"""The weights with the lowest held-out loss become the result, and a run ends when its loss no longer falls."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import qlora
from runs_for_tests import stop_after

from qlora.errors import ModelError, RecipeError
from qlora.recipe import Recipe
from qlora.storage import folders, manifest
from qlora.training import train as loop
from qlora.training.evaluation import Evaluation
from qlora.training.result import TrainResult
from qlora.training.train import train

RecipeFile = Callable[..., Path]
ADAPTER = "adapter/adapter_model.safetensors"
LOSSES = {0: 5.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 2.25, 12: 1.5}
pytestmark = pytest.mark.usefixtures("without_forecast")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Give evaluations these losses instead of their own."""
    given, compute = dict(LOSSES), loop.evaluate_held_out

    def evaluated(session: Any, tracker: Any, step: int, stop: Any) -> Evaluation:
        compute(session, tracker, step, stop)
        return Evaluation(given[step])

    monkeypatch.setattr(loop, "evaluate_held_out", evaluated)
    return given


def run(file: Path, *overrides: str, **options: Any) -> TrainResult:
    return train(Recipe.load(file, overrides), terminal=False, **options)


def adapter(run: Path) -> bytes:
    return (run / ADAPTER).read_bytes()


@pytest.fixture
def file(recipe_file: RecipeFile) -> Path:
    return recipe_file(
        adapter={"dropout": 0.1},
        training={"max_steps": 10, "eval_every": 2, "save_every": 3, "result": "best"},
    )


@pytest.mark.parametrize(
    "stop", [pytest.param(None, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)]
)
def test_the_result_is_that_of_the_lowest_loss_also_after_a_stop(
    file: Path, tmp_path: Path, losses: dict[int, float], monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    short = run(file, f"output={tmp_path / 'short'}", "training.max_steps=4", "training.result=last")
    if stop is not None:
        with monkeypatch.context() as patched:
            stop_after(stop, patched)
            assert run(file).result is None
    done = run(file, resume=stop is not None)
    assert (done.steps, done.result_step, done.loss_after) == (10, 4, 2.0)
    assert adapter(done.run) == adapter(short.run)
    assert manifest.read(done.run / "adapter")["step"] == 4
    longer = run(file, "training.max_steps=12", resume=True)
    assert (longer.steps, longer.result_step, longer.loss_after) == (12, 12, 1.5)
    whole = run(file, f"output={tmp_path / 'whole'}", "training.max_steps=12", "training.result=last")
    assert adapter(longer.run) == adapter(whole.run), (
        "the best weights do not replace those that are trained on"
    )


def test_a_run_without_patience_left_ends_early_and_goes_on_with_more(
    file: Path, tmp_path: Path, losses: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    ended = run(file, "training.patience=2", "training.result=last")
    assert (ended.steps, ended.total_steps, ended.result_step, ended.stopped_by) == (8, 10, 8, None)
    assert ended.result is not None
    assert "no lower held-out loss in 2 evaluations, so the run ends at step 8" in caplog.text
    assert run(file, "training.patience=2", "training.result=last", resume=True) == ended
    more = run(file, "training.patience=3", "training.result=last", resume=True)
    assert (more.steps, more.result_step) == (10, 10)
    whole = run(file, f"output={tmp_path / 'whole'}", "training.result=last")
    assert adapter(more.run) == adapter(whole.run)


def test_the_end_names_the_step_of_the_result(file: Path, losses: dict[int, float]) -> None:
    done = qlora("train", file, "training.patience=1")
    assert done.returncode == 0
    assert "the result is that of step 4, which has the lowest held-out loss" in done.stderr
    assert "held-out loss  5.000 before, 2.000 after, at step 4" in done.stdout
    run = Path(Recipe.load(file).output)
    assert "at step 4" in (run / "report.html").read_text()
    assert "time" in done.stdout
    assert "6 of 10 steps" in done.stdout
    assert "best/          the weights with the best evaluation so far" in done.stdout


def test_best_weights_that_cannot_be_kept_or_are_damaged_are_named(
    file: Path, losses: dict[int, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = folders.commit
    full = {4}

    def no_room(folder: Path, final: Path) -> None:
        if final.name == "best" and manifest.read(folder)["step"] in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
        commit(folder, final)

    monkeypatch.setattr(folders, "commit", no_room)
    done = run(file)
    assert (
        "the weights of step 4, whose held-out loss is the lowest, are not kept: cannot write" in caplog.text
    )
    assert (done.result_step, done.loss_after) == (8, 2.0)
    full.clear()
    with monkeypatch.context() as patched:
        stop_after(7, patched)
        run(file, fresh=True)
    shutil.rmtree(done.run / "best")
    ended = run(file, resume=True)
    assert "the weights of step 4, whose held-out loss is the lowest so far, are not there" in caplog.text
    assert (ended.result_step, ended.loss_after) == (8, 2.0)


def test_a_best_folder_that_is_damaged_at_the_end_is_an_error(
    file: Path, losses: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop.save

    def damaging(session: Any, run: Any, progress: Any, tracker: Any) -> None:
        save(session, run, progress, tracker)
        if progress.step == 10:
            next((run.path / "best/adapter").glob("*.safetensors")).write_bytes(b"")

    monkeypatch.setattr(loop, "save", damaging)
    with pytest.raises(
        ModelError, match=r"best: file adapter/adapter_model.safetensors: expected .*result=last"
    ):
        run(file)
    monkeypatch.undo()
    assert run(file, "training.result=last", resume=True).result_step == 10


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"patience": 2}}, "training.patience: needs evaluations during the run"),
        ({"training": {"result": "best"}}, "training.result: needs evaluations during the run"),
        (
            {"training": {"result": "best", "eval_every": 2}, "data": {"held_out": 0}},
            "training.result: has no effect",
        ),
        (
            {"training": {"patience": 1, "eval_every": 2}, "adapter": {"method": "adalora"}},
            "training.patience: adalora changes its ranks until the last step",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(recipe_file: RecipeFile, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.load(recipe_file(**sections))
