"""A finished run goes on from its last checkpoint when its recipe asks for more steps."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs_for_tests import stop_after

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.storage import manifest
from qlora.training import checkpoint
from qlora.training import train as loop
from qlora.training.result import TrainResult
from qlora.training.train import train

RecipeFile = Callable[..., Path]
ADAPTER = "adapter/adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("without_forecast")


def run(file: Path, *overrides: str, **options: Any) -> TrainResult:
    return train(Recipe.load(file, overrides), terminal=False, **options)


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def same(one: Path, other: Path) -> bool:
    return (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()


@pytest.mark.parametrize("killed", [False, True])
def test_a_lengthened_run_ends_where_the_uninterrupted_one_ends(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    file = recipe_file(
        adapter={"dropout": 0.1},
        data={"packing": True, "limit": 27},
        training={"save_every": 3, "eval_every": 2},
    )
    whole = run(file, "training.max_steps=9", f"output={tmp_path / 'whole'}")
    short = run(file, "training.max_steps=4")
    assert short.result is not None
    if killed:
        with monkeypatch.context() as patched:
            stop_after(5, patched)
            stopped = run(file, "training.max_steps=9", resume=True)
        assert (stopped.steps, stopped.result) == (5, None)
        assert not (short.run / "result.json").exists()
    longer = run(file, "training.max_steps=9", resume=True)
    assert (longer.steps, longer.loss_before, longer.loss_after) == (9, whole.loss_before, whole.loss_after)
    assert same(longer.run, whole.run)
    assert records(longer.run) == records(whole.run)


def test_another_schedule_gives_a_run_with_that_sequence_of_rates(
    recipe_file: RecipeFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = recipe_file(optimizer={"schedule": "cosine", "lr": 1e-2, "warmup_steps": 1})
    run(file, "training.max_steps=3")
    longer = train(Recipe.load(file, ["training.max_steps=6"]), resume=True)
    said = "the run had 3 steps before and has 6 now, so the learning rate changes its course"
    assert said in capsys.readouterr().err
    rate = loop.learning_rate

    def sequence(schedule: str, lr: float, step: int, total: int, warmup: int) -> float:
        return rate(schedule, lr, step, 3 if step < 3 else total, warmup)

    monkeypatch.setattr(loop, "learning_rate", sequence)
    whole = run(file, "training.max_steps=6", f"output={tmp_path / 'whole'}")
    assert same(longer.run, whole.run)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_run_killed_between_its_last_checkpoint_and_its_result_records_nothing_twice(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    file = recipe_file(adapter={"method": method}, training={"max_steps": 6})
    whole = run(file, f"output={tmp_path / 'whole'}")

    def killed(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_result", killed)
        with pytest.raises(InterruptedError):
            run(file)
    ended = run(file, resume=True)
    assert same(ended.run, whole.run)
    assert records(ended.run) == records(whole.run)
    assert ended.loss_after == whole.loss_after


def test_a_result_is_written_also_without_room_for_the_last_checkpoint(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = manifest.write

    def full(folder: Path, **about: Any) -> None:
        if "step-" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, **about)

    monkeypatch.setattr(manifest, "write", full)
    file = recipe_file(training={"max_steps": 3, "save_every": 1})
    assert run(file).result is not None
    assert "checkpoint of step 3 not saved" in caplog.text
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"Its last checkpoint, with the optimizer's state, is not there"):
        run(file, "training.max_steps=4", resume=True)


def test_another_result_of_a_finished_run_is_said_to_have_no_effect(
    recipe_file: RecipeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(training={"eval_every": 2})
    run(file)
    for changes, said in (([], False), (["training.result=best"], True)):
        train(Recipe.load(file, changes), resume=True)
        assert ("training.result=best has no effect" in capsys.readouterr().err) is said


def test_what_cannot_become_longer_says_why(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(training={"max_steps": 4, "save_every": 2})
    done = run(file)
    newest = checkpoint.newest(done.run)
    assert newest is not None
    assert newest.name == "step-000004"
    shutil.rmtree(newest)
    before = (done.run / "result.json").read_bytes()
    with pytest.raises(RecipeError, match="Its last checkpoint"):
        run(file, "training.max_steps=5", resume=True)
    assert (done.run / "result.json").read_bytes() == before
    planned = recipe_file(
        adapter={"method": "adalora"}, training={"max_steps": 4}, output=str(tmp_path / "a")
    )
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        assert run(planned).stopped_by == signal.SIGTERM
    with pytest.raises(RecipeError, match=r"began with 4 steps, and now has 6\. adalora plans its ranks"):
        run(planned, "training.max_steps=6", resume=True)
    assert run(planned, resume=True).result is not None
    with pytest.raises(RecipeError, match=r"finished after 4 steps.*adalora plans its ranks"):
        run(planned, "training.max_steps=6", resume=True)
