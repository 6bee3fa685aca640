"""Functions of the caller: metrics at each evaluation and a call after each step, which never disturb the training."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from examples_for_tests import ROOT
from runs_for_tests import killed_and_resumed, stop_after

from qlora.errors import FunctionError, RecipeError, UsageError
from qlora.inference.load import load_trained
from qlora.recipe import Recipe
from qlora.report.page import render
from qlora.training import check as checking
from qlora.training import checkpoint, functions
from qlora.training import train as loop
from qlora.training.functions import Functions, HeldOut
from qlora.training.result import TrainResult
from qlora.training.train import train

RecipeFile = Callable[..., Path]
ADAPTER = "adapter/adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("without_forecast", "without_pictures")
SCORES = {0: 0.0, 2: 0.75, 4: 0.25, 6: 0.5, 8: 0.25}


def run(file: Path, *overrides: str, **options: Any) -> TrainResult:
    return train(Recipe.load(file, overrides), terminal=False, **options)


def adapter(run: Path) -> bytes:
    return (run / ADAPTER).read_bytes()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "eval_loss" in line]


def score(held_out: HeldOut) -> dict[str, float]:
    return {"score": SCORES[held_out.step]}


def careless(held_out: HeldOut) -> dict[str, float]:
    """Do everything that could disturb a training."""
    answers = [held_out.answer(row, 4, temperature=1.0) for row in held_out.examples[:2]]
    drawn = torch.rand(()).item() + random.random() + float(np.random.rand())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    for module in held_out.model.modules():
        module.training = module is held_out.model
    return {"length": sum(map(len, answers)), "drawn": drawn}


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report, whose pictures take as long as the steps."""
    monkeypatch.setattr(loop, "write_page", lambda session, run: None)


@pytest.fixture
def file(recipe_file: RecipeFile) -> Path:
    """Return a recipe with dropout, an evaluation at every second step and a checkpoint at every third."""
    return recipe_file(
        adapter={"dropout": 0.1},
        training={"max_steps": 8, "eval_every": 2, "save_every": 3, "global_batch_size": 2},
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_functions_change_no_bit_of_the_adapter_also_over_a_kill(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    settings = [f"base.compute_dtype={dtype}", f"output={tmp_path / 'without'}", "training.max_steps=6"]
    recipe = Recipe.load(file, settings)
    without = train(recipe, terminal=False).run
    states: list[Any] = []

    def noisy(record: Mapping[str, Any]) -> None:
        torch.rand(record["step"])
        random.seed(0)
        states.append(record["step"])

    def resume(recipe: Recipe) -> Path:
        return train(recipe, resume=True, terminal=False, metrics=careless, on_step=noisy).run

    recipe = recipe.model_copy(update={"output": str(tmp_path / "with")})
    monkeypatch.setattr(
        loop, "train", lambda recipe, **more: train(recipe, metrics=careless, on_step=noisy, **more)
    )
    killed = killed_and_resumed(recipe, 5, monkeypatch, resume)
    assert adapter(killed) == adapter(without)
    numbers = evaluations(killed)
    assert states == [1, 2, 3, 4, 5, 4, 5, 6]
    random.seed(99)
    torch.manual_seed(99)
    again = train(recipe, fresh=True, terminal=False, metrics=careless).run
    first, second = (
        [(line["eval_length"], line["eval_drawn"]) for line in lines_of if line["step"] in (0, 4)]
        for lines_of in (numbers, evaluations(again))
    )
    assert first == second, "the random numbers of a metric depend on the step alone"


def held_out_without_rows() -> HeldOut:
    return HeldOut(0, 1.0, (), torch.nn.Dropout(), None, Mock(), frozenset(), lambda: False)


def test_the_caller_s_random_numbers_continue_after_a_metric() -> None:
    held_out = held_out_without_rows()
    given: list[Any] = []

    def seeding(held_out: HeldOut) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        assert not held_out.model.training
        given.append(careless(held_out))
        return {}

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Functions(seeding).evaluate(held_out, (), 0)
    assert given
    assert held_out.model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_metric_sees_the_rows_and_asks_the_present_model(file: Path) -> None:
    asked: list[tuple[int, str, str]] = []

    def look(held_out: HeldOut) -> dict[str, float]:
        row = held_out.examples[0]
        answer = held_out.answer(row, 5)
        assert held_out.answer(row, 5) is answer, "an answer is generated once"
        assert held_out.answer(row.prompt, 5) == answer, "a text is asked in the layout of the rows"
        assert len(held_out.examples) == 4
        assert row.prompt
        assert row.reference.startswith("team: ")
        assert ".jsonl:" in row.origin
        asked.append((held_out.step, row.prompt, answer))
        return {"answer/length": np.int64(len(answer)), "loss_again": torch.tensor(held_out.loss)}  # type: ignore[dict-item]

    short = "training.max_steps=2", "optimizer.lr=0.1"
    done = run(file, *short, metrics=[look, lambda held_out: {"one": True}])
    assert [step for step, _, _ in asked] == [0, 2]
    assert len({answer for _, _, answer in asked}) > 1
    last = evaluations(done.run)[-1]
    assert last["eval_loss_again"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert done.metrics == {
        "answer/length": len(asked[-1][2]),
        "loss_again": last["eval_loss_again"],
        "one": 1.0,
    }
    assert json.loads((done.run / "result.json").read_text())["metrics"] == done.metrics
    assert "<b>answer/length</b>" in render(done.run)
    assert run(file, *short, resume=True) == done


def test_on_step_gets_the_lines_of_the_record_and_stops_the_run(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(file, f"output={tmp_path / 'whole'}", "training.max_steps=6")
    seen: list[dict[str, Any]] = []

    def until_4(record: Mapping[str, Any]) -> Any:
        seen.append(dict(record))
        with pytest.raises(TypeError):
            record["loss"] = 0  # type: ignore[index]
        return np.float64(record["step"]) >= 4  # numpy's True is not Python's

    stopped = run(file, "training.max_steps=6", on_step=until_4)
    assert (stopped.steps, stopped.result, stopped.stopped_by) == (4, None, "on_step")
    assert "on_step ends the run at step 4 of 6; resume=True goes on" in caplog.text
    assert seen == [line for line in lines(stopped.run) if "loss" in line]
    assert [line["step"] for line in evaluations(stopped.run)] == [0, 2, 4], "the evaluation due is done"
    done = run(file, "training.max_steps=6", resume=True, on_step=lambda record: record["step"] == 6)
    assert (done.steps, done.stopped_by) == (6, None), "after the last step nothing is left to stop"
    assert adapter(done.run) == adapter(whole.run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"on_step": lambda record: 1 / 0 if record["step"] == 2 else None},
            "on_step: <lambda> .*: division by zero",
        ),
        (
            {"metrics": lambda held_out: {"a": 1 / (2 - held_out.step)}},
            "metrics: <lambda> .*: division by zero",
        ),
    ],
)
def test_a_function_that_fails_is_named_and_the_run_loses_nothing(
    file: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(FunctionError, match=said) as caught:
        run(file, "training.max_steps=4", **options)
    assert "test_functions.py:" in str(caught.value)
    assert "stopped at step 2 and is saved" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError), "Python shows the place in the function"
    newest = checkpoint.newest(Path(Recipe.load(file).output))
    assert newest is not None
    assert newest.name == "step-000002"
    done = run(file, "training.max_steps=4", resume=True, metrics=score)
    assert [line["step"] for line in lines(done.run) if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations(done.run)] == [0, 2, 4]
    assert done.metrics == {"score": 0.25}


def test_a_function_cannot_end_the_program_or_change_the_tokenizer(file: Path, tmp_path: Path) -> None:
    def leave(record: Any) -> None:
        if record["step"] == 2:
            raise SystemExit(3)

    with pytest.raises(FunctionError, match="failed with SystemExit"):
        run(file, "training.max_steps=4", on_step=leave)
    assert checkpoint.newest(Path(Recipe.load(file).output)).name == "step-000002"  # type: ignore[union-attr]

    def pads(held_out: Any) -> dict[str, float]:
        held_out.tokenizer.add_tokens(["<zzz>"])
        held_out.tokenizer.padding_side = "left"
        return {"a": 1}

    done = run(file, f"output={tmp_path / 'pads'}", metrics=pads)
    assert "<zzz>" not in (done.run / "adapter/tokenizer.json").read_text()
    assert load_trained(done.run, device="cpu").tokenizer.padding_side == "right"
    with pytest.raises(UsageError, match="choose one"):
        run(file, resume=True, fresh=True)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (0.5, r"returned 0.5 \(float\); it must return numbers by name"),
        ({"a": math.nan}, "returned nan for a; it must be a finite number"),
        ({"a": torch.tensor(math.inf)}, "returned inf for a; it must be a finite number"),
        ({"a": "b"}, r"returned 'b' \(str\) for a; it must be a number"),
        ({"a": torch.zeros(2)}, r"returned tensor\(\[0., 0.\]\) \(Tensor\) for a; it must be a number"),
        ({"a b": 1}, r"the name 'a b' \(str\); a name begins with a letter"),
        ({"loss": 1}, "returned loss, which the evaluation has already"),
        ({"accuracy": 1}, "returned accuracy, which the evaluation has already"),
    ],
)
def test_a_metric_that_returns_something_else_than_numbers_is_named(returned: Any, said: str) -> None:
    with pytest.raises(FunctionError, match=said):
        Functions([score, lambda held_out: returned]).evaluate(held_out_without_rows(), ["accuracy"], 0)
    with pytest.raises(FunctionError, match="returned score, which the evaluation has already"):
        Functions([score, score]).evaluate(held_out_without_rows(), (), 0)


def test_an_on_step_that_returns_something_else_is_named() -> None:
    functions = Functions(on_step=lambda record: "stop")  # type: ignore[arg-type,return-value]
    functions.after_step({"step": 1})
    assert functions.end_run
    assert "returned 'stop' (str); it must return True to stop the run" in str(functions.failure)


@pytest.mark.parametrize(
    "wrong", [{"metrics": "score"}, {"metrics": [1]}, {"metrics": {"a": score}}, {"on_step": 1}]
)
def test_what_is_no_function_is_refused_at_once(file: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is no function"):
        run(file, **wrong)
    assert not Path(Recipe.load(file).output).exists()


BEST = ("training.result=best", "training.best_by=highest score")


@pytest.mark.parametrize("stop", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_the_result_is_that_of_the_best_metric_also_after_a_stop(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stop: int | None,
) -> None:
    short = run(file, f"output={tmp_path / 'short'}", "training.max_steps=2")
    if stop is not None:
        with monkeypatch.context() as patched:
            stop_after(stop, patched)
            assert run(file, *BEST, metrics=score).result is None
    done = run(file, *BEST, "training.patience=2", metrics=score, resume=stop is not None)
    assert (done.steps, done.result_step, done.metrics) == (6, 2, {"score": 0.75})
    assert done.loss_after == evaluations(done.run)[1]["eval_loss"]
    assert adapter(done.run) == adapter(short.run)
    assert "the result is that of step 2, which has the highest score" in caplog.text
    assert "no higher score in 2 evaluations, so the run ends at step 6" in caplog.text


def test_metrics_without_rows_are_refused_and_check_says_what_a_recipe_needs(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["data.held_out=0", "training.eval_every=null"]
    with pytest.raises(RecipeError, match=r"metrics: data\.held_out is 0, so there are no rows"):
        Functions(score).check(Recipe.load(file, settings))
    Functions().check(Recipe.load(file, settings))
    monkeypatch.setattr(checking, "_rows", lambda *_: (None, False))
    monkeypatch.setattr(checking, "_assumed_memory", lambda *_: None)
    (note,) = checking.check(Recipe.load(file, BEST)).notes
    assert note.startswith(
        "training.best_by: score is computed by a function of yours: train with qlora.train"
    )
    assert checking.check(Recipe.load(file)).notes == []


def test_a_metric_that_is_not_given_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RecipeError, match="best_by: score is computed by a function of yours"):
        run(file, *BEST)
    with pytest.raises(FunctionError, match="no function in metrics= returned score; they returned other"):
        run(file, *BEST, metrics=lambda held_out: {"other": 1})
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        run(file, *BEST, metrics=score, fresh=True)
    with pytest.raises(RecipeError, match="in Python, also to resume"):
        run(file, *BEST, resume=True)
    with pytest.raises(RecipeError, match=r"training\.best_by: 'highest score' then, 'lowest loss' now"):
        run(file, "training.result=best", metrics=score, resume=True)
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        run(file, metrics=score, fresh=True)
    assert run(file, "training.max_steps=2", resume=True).metrics == {}
    assert "this run had functions for score, and continues without: pass them as metrics=..." in caplog.text


@pytest.mark.parametrize(
    ("best_by", "said"),
    [
        ("score", "must be lowest loss, lowest NAME or highest NAME of a metric"),
        ("highest loss", "a higher loss is worse"),
        ("highest score", "has no effect without training.result: best or training.patience"),
    ],
)
def test_a_number_to_follow_that_makes_no_sense_is_refused(
    recipe_file: RecipeFile, best_by: str, said: str
) -> None:
    file = recipe_file(training={"eval_every": 2, "best_by": best_by})
    with pytest.raises(RecipeError, match=said):
        Recipe.load(file, ["training.patience=1"] if best_by == "highest loss" else [])
    assert Recipe.load(file, ["training.result=last", "training.best_by=lowest loss"])


def test_a_signal_while_a_metric_asks_the_model_leaves_the_evaluation_due(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, answered = functions.answer, []

    def signalled(*arguments: Any, **more: Any) -> str:
        answered.append(1)
        if len(answered) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(*arguments, **more)

    def interrupted(held_out: HeldOut) -> dict[str, float]:
        text = held_out.answer(held_out.examples[0], 4)
        assert len(answered) != 2, "an answer that a signal cut off never arrives"
        return {"length": len(text)}

    monkeypatch.setattr(functions, "answer", signalled)
    stopped = run(file, "training.max_steps=2", metrics=interrupted)
    assert (stopped.steps, stopped.stopped_by) == (2, signal.SIGINT)
    assert [line["step"] for line in evaluations(stopped.run)] == [0]
    done = run(file, "training.max_steps=2", metrics=interrupted, resume=True)
    assert [line["step"] for line in evaluations(done.run)] == [0, 2]
    assert done.result is not None


TWO = """
import sys
from qlora.errors import FunctionError
from qlora.recipe import Recipe
from qlora.training.train import train

rank, file, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
calls = []

def score(held_out):
    calls.append(held_out.step)
    if how == "metric" and held_out.step == 2:
        raise KeyError("b")
    return {"score": {0: 0.0, 2: 0.75}.get(held_out.step, 0.25)}

def on_step(record):
    calls.append("step")
    if how == "step":
        raise KeyError("b")
    return record["step"] == 5

given = {"metrics": score, "on_step": on_step} if rank == 0 or how != "main" else {}
try:
    result = train(Recipe.load(file), terminal=False, **given)
    print(result.steps, result.stopped_by, result.metrics, len(calls))
except FunctionError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("all", "5 on_step {'score': 0.25} 8|5 on_step {'score': 0.25} 0"),
        ("main", "5 on_step {'score': 0.25} 8|5 on_step {'score': 0.25} 0"),
        ("metric", "score KeyError: 'b' stopped at step 2"),
        ("step", "on_step KeyError: 'b' stopped at step 1"),
    ],
)
def test_only_the_main_process_calls_functions_and_none_waits_for_ever(
    file: Path, recipe_file: RecipeFile, tmp_path: Path, how: str, said: str
) -> None:
    import socket

    recipe_file(
        training={
            "max_steps": 8,
            "eval_every": 2,
            "result": "best",
            "best_by": "highest score",
            "patience": 9,
        }
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, rank, str(file), how], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    printed = [process.communicate(timeout=120)[0].strip() for process in started]
    for text, expected in zip(printed, said.split("|") * 2, strict=False):
        assert all(word in text for word in expected.split()), printed


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    short = ["training.max_steps=2", "data.limit=64", "data.held_out=4", "optimizer.warmup_steps=0"]
    file = ROOT / "docs/examples/exact_match.py"
    done = subprocess.run([sys.executable, file, *short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "held-out", "exact_match", "field_match", "steps", "time", "memory", "files"
    ]  # fmt: skip
    assert "exact_match 0" in done.stderr
