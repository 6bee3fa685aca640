"""Whole runs learn, repeat to the bit, survive kills, and overwrite nothing without a flag."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes_for_tests import Process, two_ranks

from qlora import bundled
from qlora.cli.train import report
from qlora.errors import DataError, DivergedError, RecipeError
from qlora.inference.load import held_out_loss, load_trained
from qlora.recipe import Recipe
from qlora.storage import folders, manifest
from qlora.tracking import Tracker
from qlora.training import checkpoint
from qlora.training import train as loop
from qlora.training.result import TrainResult
from qlora.training.session import Session
from qlora.training.train import train

RecipeFile = Callable[..., Path]
ADAPTER = "adapter/adapter_model.safetensors"
# Settings for a crash test: several epochs, an incomplete last group, dropout, packing, checkpoints
LONG = {
    "adapter": {"dropout": 0.1},
    "data": {"limit": 27, "packing": True},
    "training": {
        "max_steps": None,
        "epochs": 3,
        "save_every": 2,
        "eval_every": 3,
        "samples": 1,
        "sample_tokens": 4,
    },
}


def run(file: Path, *overrides: str, **kwargs: Any) -> TrainResult:
    """Train without the memory forecast, which takes longer than the run and does not change it."""
    with patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")):
        return train(Recipe.load(file, overrides), terminal=False, **kwargs)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the record without the values that depend on the clock and on the rest of the process."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = {"tokens_per_second", "peak_memory_bytes"}
    return [{key: value for key, value in line.items() if key not in machine} for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_and_writes_the_documented_files(recipe_file: RecipeFile, dtype: str) -> None:
    file = recipe_file(
        base={"compute_dtype": dtype},
        training={"max_steps": 12, "eval_every": 6, "save_every": 5},
        optimizer={"lr": 1e-2},
    )
    outcome = train(Recipe.load(file), terminal=False)
    assert outcome.loss_before is not None
    assert outcome.loss_after is not None
    assert outcome.loss_after < outcome.loss_before - 0.3
    left = {path.name for path in outcome.run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "adapter", "result.json", "report.html"} <= left
    assert {"memory.json", "memory.md", "memory.png"} <= left
    assert Recipe.load(outcome.run / "recipe.yaml").to_dict() == Recipe.load(file).to_dict()
    record = metrics(outcome.run)
    steps = [line for line in record if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens"}
    assert [line["step"] for line in record if "eval_loss" in line] == [0, 6, 12]
    assert held_out_loss(load_trained(outcome.run))[0] == outcome.loss_after
    base = load_trained(outcome.run, with_adapter=False)
    assert held_out_loss(base)[0] == pytest.approx(outcome.loss_before, rel=1e-6)


def test_the_same_recipe_gives_the_same_run(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file(**LONG)
    first, second = run(file, f"output={tmp_path / 'a'}"), run(file, f"output={tmp_path / 'b'}")
    assert metrics(first.run) == metrics(second.run)
    assert (first.run / ADAPTER).read_bytes() == (second.run / ADAPTER).read_bytes()
    other = run(file, f"output={tmp_path / 'c'}", "training.seed=1")
    assert (first.run / ADAPTER).read_bytes() != (other.run / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("paged_adamw_32bit", 1),
        pytest.param("paged_adamw_32bit", 4, marks=pytest.mark.slow),
        ("paged_adamw_32bit", 5),
        ("adamw_8bit", 4),
        ("lion", 3),
    ],
)
def test_a_resumed_run_ends_with_the_same_adapter_bit_for_bit(
    recipe_file: RecipeFile, tmp_path: Path, name: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(**LONG, optimizer={"name": name, "schedule": "cosine", "warmup_steps": 2})
    whole = run(file, f"output={tmp_path / 'whole'}")
    update = loop.update

    def interrupted(session: Session, batches: Any, step: int, lr: float) -> dict[str, float]:
        if step == stop:
            raise InterruptedError
        return update(session, batches, step, lr)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(InterruptedError):
        run(file)
    monkeypatch.undo()
    resumed = run(file, resume=True)
    assert (resumed.run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()
    assert metrics(resumed.run) == metrics(whole.run)
    assert resumed.loss_before == whole.loss_before


@pytest.mark.slow
def test_a_mixture_and_rows_in_memory_resume_bit_for_bit(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = bundled.path("bundled/tickets/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:20]]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, part in zip(files, (rows[:14], rows[14:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    sources = [{"source": str(file), "weight": weight} for file, weight in zip(files, (1, 2), strict=True)]
    training = {"max_steps": 8, "save_every": 2, "global_batch_size": 2}
    update = loop.update

    def interrupted(session: Session, batches: Any, step: int, lr: float) -> dict[str, float]:
        if step == 5:
            raise InterruptedError
        return update(session, batches, step, lr)

    for data, given in (
        ({"source": None, "sources": sources, "packing": True}, None),
        ({"source": "tickets"}, rows),
    ):
        file = recipe_file(data=data, training=training)
        whole = run(file, f"output={tmp_path / 'whole'}", fresh=True, rows=given)
        with monkeypatch.context() as patched:
            patched.setattr(loop, "update", interrupted)
            with pytest.raises(InterruptedError):
                run(file, fresh=True, rows=given)
        if given:
            with pytest.raises(DataError, match="the data set has changed since this checkpoint"):
                run(file, resume=True, rows=given[:-1])
        resumed = run(file, resume=True, rows=given)
        assert (resumed.run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()


def test_a_run_killed_by_sigkill_and_resumed_ends_with_the_same_adapter(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    file = recipe_file(**LONG)
    whole = run(file, f"output={tmp_path / 'whole'}")
    for step in (1, 5):
        process = Process("train", file, "--resume", folder=tmp_path)
        process.wait_for_step(tmp_path / "run", step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "run" / "result.json").exists()
    process = Process("train", file, "--resume", folder=tmp_path)
    assert process.wait() == 0, process.err
    assert "held-out loss" in process.out
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()
    assert metrics(tmp_path / "run") == metrics(whole.run)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        # by default, test_hangup closes a real terminal
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_sets_the_exit_code(
    recipe_file: RecipeFile, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = Process("train", recipe_file(training={"max_steps": 500}), folder=tmp_path)
    process.wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    assert process.wait() == code, process.err
    assert "Traceback" not in process.err
    assert "--resume" in process.out
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert checkpoint.read_state(newest)["step"] == metrics(tmp_path / "run")[-1]["step"] >= 3


@pytest.mark.parametrize("saved", [0, 2, 3])
def test_a_stopped_run_reports_the_checkpoint_that_was_written(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, saved: int
) -> None:
    take_step, write = loop.take_step, manifest.write

    def stopped(session: Session, step: int, tracker: Tracker) -> int:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(session, step, tracker)

    def full(folder: Path, **about: Any) -> None:
        if about.get("step", 0) > saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, **about)

    monkeypatch.setattr(loop, "take_step", stopped)
    monkeypatch.setattr(manifest, "write", full)
    outcome = run(recipe_file(training={"save_every": 2}))
    assert (outcome.steps, outcome.stopped_by) == (3, signal.SIGTERM)
    last = report(outcome).splitlines()[-1]
    assert ("checkpoint of step 3 not saved" in caplog.text) == (saved != 3)
    if saved == 0:
        assert last == "stopped early; no checkpoint could be saved, so --resume starts again at step 0"
    elif saved == 2:
        assert last == (
            "stopped early after step 3; the newest checkpoint is of step 2, from which --resume goes on"
        )
    else:
        assert last == "stopped early; a checkpoint of step 3 is saved. Resume with --resume"


def test_a_signal_at_the_very_end_leaves_a_run_finished(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = loop.write_result

    def signalled(*arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(loop, "write_result", signalled)
    file = recipe_file()
    assert run(file).stopped_by is None
    assert run(file, resume=True).stopped_by is None


def test_layers_that_no_gradient_reaches_are_named(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = loop.update

    def detached(session: Session, *arguments: Any) -> dict[str, float]:
        metrics = update(session, *arguments)
        for parameter in session.model.get_submodule("model.layers.1.self_attn").parameters():
            if parameter.requires_grad:
                parameter.grad.zero_()
        return metrics

    run(recipe_file(training={"max_steps": 2}))
    assert "no gradient" not in caplog.text
    monkeypatch.setattr(loop, "update", detached)
    run(recipe_file(training={"max_steps": 2}), fresh=True)
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    said = f"no gradient reached {', '.join(names)} and 1 more in the first step"
    assert caplog.text.count(said) == 1


def test_an_existing_run_is_not_overwritten(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file()
    first = run(file)
    before = (first.run / ADAPTER).read_bytes()
    with pytest.raises(RecipeError, match=r"--resume.*--fresh"):
        run(file)
    assert run(file, resume=True).loss_after == first.loss_after  # finished: nothing left to do
    assert (first.run / ADAPTER).read_bytes() == before
    run(file, "training.seed=3", fresh=True)
    assert (first.run / ADAPTER).read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="not a run of qlora"):
        run(file, f"output={tmp_path / 'mine'}", fresh=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_fresh_run_killed_at_its_start_resumes_to_the_same_adapter(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    file = recipe_file(training={"save_every": 2})
    whole = run(file, "training.seed=1", f"output={tmp_path / 'whole'}")
    old = run(file)
    with pytest.MonkeyPatch.context() as patch:
        # The state after a kill between abandoning the old run and removing its files.
        patch.setattr(folders, "clear", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(file, "training.seed=1", fresh=True)
    assert (old.run / ADAPTER).is_file()
    resumed = run(file, "training.seed=1", resume=True)
    assert (resumed.run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()
    assert metrics(resumed.run) == metrics(whole.run)


def test_bad_input_removes_no_older_run_and_leaves_no_new_one(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    file = recipe_file()
    first = run(file)
    before = (first.run / ADAPTER).read_bytes()
    (tmp_path / "bad.jsonl").write_text("not a row\n")
    bad = f"data.source={tmp_path / 'bad.jsonl'}"
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        run(file, bad, fresh=True)
    assert (first.run / ADAPTER).read_bytes() == before
    with pytest.raises(DataError):
        run(file, bad, f"output={tmp_path / 'new'}")
    assert run(file, f"output={tmp_path / 'new'}").result is not None


def test_a_run_is_not_resumed_with_a_recipe_that_computes_something_else(recipe_file: RecipeFile) -> None:
    file = recipe_file(training={"save_every": 2})
    run(file, "training.max_steps=2")
    with pytest.raises(RecipeError, match=r"optimizer\.lr: 0\.0002 then, 0\.1 now"):
        run(file, "optimizer.lr=0.1", resume=True)


def test_a_non_finite_loss_stops_before_the_update(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(training={"save_every": 1})
    seen: dict[str, Any] = {}

    def poisoned(session: Session, *args: Any) -> dict[str, float]:
        parameter = next(p for p in session.model.parameters() if p.requires_grad)
        if args[1] == 2:
            parameter.data[0, 0] = float("nan")
            seen["before"] = {n: p.clone() for n, p in session.model.named_parameters() if p.requires_grad}
            seen["session"] = session
        return update(session, *args)

    update = loop.update
    monkeypatch.setattr(loop, "update", poisoned)
    with pytest.raises(
        DivergedError, match=r"step 3: the loss is nan.*lora_a is not finite since an earlier"
    ):
        run(file)
    after = dict(seen["session"].model.named_parameters())
    assert all(torch.equal(after[n].nan_to_num(), p.nan_to_num()) for n, p in seen["before"].items())


def test_a_loss_that_overflows_with_finite_weights_blames_the_step(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = loop.accumulate

    def overflowing(*args: Any, **more: Any) -> Any:
        sums = accumulate(*args, **more)
        sums.sum.fill_(float("inf"))
        return sums

    monkeypatch.setattr(loop, "accumulate", overflowing)
    with pytest.raises(DivergedError, match=r"step 1: the loss is inf .*No weight was updated"):
        run(recipe_file())


def test_full_training_from_random_weights_resumes_too(recipe_file: RecipeFile, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "base": {"init": "random", "quantization": "none"},
        "adapter": None,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "training": {"max_steps": 6, "save_every": 4, "epochs": 1},
    }
    file = recipe_file(**sections)
    recipe = json.loads(file.read_text())
    recipe["adapter"] = {"method": "full"}
    file.write_text(json.dumps(recipe))
    whole = run(file, f"output={tmp_path / 'whole'}")
    assert whole.loss_after is not None
    assert whole.loss_before is not None
    assert whole.loss_after < whole.loss_before - 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_result", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            run(file)
    resumed = run(file, resume=True)
    name = "model/model.safetensors"
    assert (resumed.run / name).read_bytes() == (whole.run / name).read_bytes()
    assert held_out_loss(load_trained(resumed.run))[0] == pytest.approx(whole.loss_after, rel=1e-5)


def in_two_processes(file: Path, folder: Path) -> tuple[int, str, str]:
    ranks = two_ranks(file, folder)
    codes = [process.wait() for process in ranks]
    return max(codes), "".join(process.out for process in ranks), "".join(process.err for process in ranks)


def by_torchrun(file: Path, folder: Path) -> tuple[int, str, str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "qlora", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("launch", [in_two_processes, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_take_the_same_steps_as_one(
    recipe_file: RecipeFile, tmp_path: Path, launch: Callable[[Path, Path], tuple[int, str, str]]
) -> None:
    file = recipe_file(
        adapter={"dropout": 0.1},
        training={"global_batch_size": 6, "eval_every": 2},
        optimizer={"name": "adamw"},
    )
    alone = run(file, f"output={tmp_path / 'alone'}")
    code, out, err = launch(file, tmp_path)
    assert code == 0, err
    assert out.count("held-out loss") == 1
    one, two = metrics(alone.run), metrics(tmp_path / "run")
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=2e-3)  # bf16 gradients are summed in another order
