"""TensorBoard: its event files, read with its own reader, contain every number of the record, each step once."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.tracking import Sample, Tracker
from qlora.training.run_folder import claim
from qlora.training.train import train

SAMPLES = [Sample("Send two\n\nred lamps.", "lamp 2 red", "<b>lamp</b> \ud83d"), Sample("a", "", "c")]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000200000003080600000073a3d95f"  # 2 wide, 3 high
)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def shown(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """Return all that TensorBoard shows of a run: (step, value) pairs of each tag."""
    from tensorboard.backend.event_processing import plugin_event_accumulator as accumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).tolist()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def assert_shows_the_record(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """Assert that each number and sample of metrics.jsonl is shown once, at its step. Return the other shown values."""
    left = shown(run)
    numbers: dict[str, list[tuple[int, float]]] = {}
    for line in lines(run):
        step = line.pop("step")
        for number, sample in enumerate(line.pop("samples", []), 1):
            at, text = left[f"samples/{number}"].pop(0)
            assert at == step
            for part in sample.values():
                assert all(f"    {row}" in text.decode() for row in part.replace("\ud83d", "?").splitlines())
        for name, value in line.items():
            numbers.setdefault(name, []).append((step, float(value)))
    for name, expected in numbers.items():
        steps, values = zip(*left.pop(name), strict=True)
        assert list(steps) == [step for step, _ in expected], name
        assert values == pytest.approx([value for _, value in expected], rel=1e-6, nan_ok=True), name
    assert not any(left.pop(tag) for tag in [tag for tag in left if tag.startswith("samples/")])
    return left


def track(run: Path, steps: range, *, loss: Callable[[int], float] = lambda number: 2.5 / number) -> Tracker:
    """Return a tracker that has recorded these steps, with an evaluation after every second step."""
    begun = {"config": {}, "sections": {"tensorboard": True}, "terminal": False}
    tracker = Tracker(run, total_steps=9, resume_step=steps.start - 1, **begun)
    if steps.start == 1:
        tracker.evaluation({"step": 0, "eval_loss": 3.0, "eval_tokens": 50})
    for number in steps:
        tracker.step({"step": number, "loss": loss(number), "lr": 2e-4, "tokens": 900 + number})
        if number % 2 == 0:
            tracker.evaluation({"step": number, "eval_loss": 3.0 / number, "eval_tokens": 50})
            tracker.samples(SAMPLES, number)
    return tracker


def test_a_resumed_run_shows_every_step_of_the_record_once(tmp_path: Path) -> None:
    tracker = track(tmp_path, range(1, 6))
    assert assert_shows_the_record(tmp_path) == {}  # the state after a kill
    tracker.finish({})
    (file,) = (tmp_path / "tensorboard").iterdir()
    with file.open("ab") as torn:
        torn.write(file.read_bytes()[:20])  # a torn last event
    track(tmp_path, range(4, 8), loss=lambda number: 1.0 / number).finish({})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert assert_shows_the_record(tmp_path) == {}
    track(tmp_path, range(1, 3), loss=lambda number: float("nan")).finish({})  # without a checkpoint
    assert assert_shows_the_record(tmp_path) == {}


def test_memory_is_shown_as_totals_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    picture.write_bytes(PNG)
    tracker = track(tmp_path, range(1, 3))
    tracker.memory(
        {"documents": {"total_bytes": 2**31}, "forecast": {"total_bytes": 2**30}, "measured": None}, picture
    )
    tracker.finish({"loss_after": 1.0})
    assert assert_shows_the_record(tmp_path) == {
        "memory/documents_gib": [(2, 2.0)],
        "memory/forecast_gib": [(2, 1.0)],
        "memory": [(2, [b"2", b"3", PNG])],
    }


def test_a_run_writes_tensorboard_files_and_a_fresh_run_removes_them(
    recipe_file: Callable[..., Path],
) -> None:
    file = recipe_file(
        training={"max_steps": 2, "samples": 1, "sample_tokens": 4}, tracking={"tensorboard": True}
    )
    recipe = Recipe.load(file)
    with patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")):
        run = train(recipe, terminal=False).run
    assert assert_shows_the_record(run) == {}
    (run / "tensorboard").rename(run.with_name("kept"))
    shutil.rmtree(run)
    run.mkdir()
    run.with_name("kept").rename(run / "tensorboard")  # this folder alone identifies the run's folder
    (run / "tensorboard" / "notes.txt").touch()
    with pytest.raises(RecipeError, match="not a run of qlora"):
        claim(recipe, run, resume=False, fresh=True)
    (run / "tensorboard" / "notes.txt").unlink()
    claim(recipe, run, resume=False, fresh=True)
    assert not (run / "tensorboard").exists()


def test_a_run_continues_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # makes its import fail
    track(tmp_path, range(1, 4)).finish({})
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard is not installed, so no event files are written; run `pip install tensorboard`"
    ]
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3]
    assert not (tmp_path / "tensorboard").exists()
