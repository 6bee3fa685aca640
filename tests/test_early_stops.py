"""A signal in the middle of an evaluation, and a result that cannot be written: what was trained is kept and named."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import HANDLED, qlora
from processes_for_tests import two_ranks

from qlora import __main__, cli
from qlora.errors import OutOfMemoryError, SaveError, UsageError
from qlora.memory.oom import out_of_memory_explained
from qlora.recipe import Recipe
from qlora.runtime.signals import StopRequest
from qlora.storage import folders
from qlora.storage.json_files import with_checksum, without_checksum
from qlora.training import checkpoint, evaluation
from qlora.training.run_folder import claim, earlier_run_id
from qlora.training.train import train

RecipeFile = Callable[..., Path]
ADAPTER = "adapter/adapter_model.safetensors"


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.mark.usefixtures("without_forecast")
@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 2, 4])
def test_a_signal_ends_an_evaluation_before_its_next_batch(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    file = recipe_file(training={"eval_every": 2}, adapter={"dropout": 0.1})
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    evaluate, batches = evaluation.evaluate, []

    def signalled(
        model: Any, given: Any, *arguments: Any, before_each: Callable[[], object], **more: Any
    ) -> Any:
        assert len(given) == 2

        def before() -> None:
            before_each()
            batches.append(len(batches))
            if len(batches) == at + 1:  # the first batch of the evaluation after step `at`
                os.kill(os.getpid(), signal.SIGTERM)

        return evaluate(model, given, *arguments, before_each=before, **more)

    monkeypatch.setattr(evaluation, "evaluate", signalled)
    stopped = train(Recipe.load(file), terminal=False)
    assert (stopped.steps, stopped.result, stopped.stopped_by) == (at, None, signal.SIGTERM)
    assert len(batches) == at + 1
    newest = checkpoint.newest(stopped.run)
    assert newest is not None
    assert newest.name == f"step-{at:06d}"
    resumed = train(Recipe.load(file), resume=True, terminal=False)
    assert (resumed.run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()
    assert records(resumed.run) == records(whole.run)
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


@pytest.mark.usefixtures("without_forecast")
def test_a_signal_ends_a_sample_answer_after_its_next_token(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(training={"eval_every": 2, "samples": 2, "sample_tokens": 12})
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    answer, tokens = evaluation.answer, []

    def signalled(*arguments: Any, stopped: Callable[[], bool], **more: Any) -> str:
        def after_each() -> bool:
            tokens.append(len(tokens))
            if len(tokens) == 24 + 5:  # in the first answer after step 2
                os.kill(os.getpid(), signal.SIGTERM)
            return stopped()

        return answer(*arguments, stopped=after_each, **more)

    monkeypatch.setattr(evaluation, "answer", signalled)
    stopped = train(Recipe.load(file), terminal=False)
    assert (stopped.steps, stopped.stopped_by, len(tokens)) == (2, signal.SIGTERM, 24 + 5)
    assert [line["step"] for line in records(stopped.run) if "eval_loss" in line] == [0]
    resumed = train(Recipe.load(file), resume=True, terminal=False)
    assert (resumed.run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()
    assert records(resumed.run) == records(whole.run)


@pytest.mark.usefixtures("without_forecast")
def test_a_result_that_does_not_fit_names_the_checkpoint_to_continue_from(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(training={"save_every": 2})
    commit = folders.commit

    def full(folder: Path, final: Path) -> None:
        if final.name == "adapter":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
        commit(folder, final)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "commit", full)
        with pytest.raises(SaveError) as caught:
            train(Recipe.load(file), terminal=False)
    run = tmp_path / "run"
    assert f"the result is not saved: cannot write {run / 'adapter'}: No space left" in str(caught.value)
    assert f"continue from {run / 'checkpoints/step-000004'} with --resume" in str(caught.value)
    assert "step-000004/adapter" in str(caught.value)
    assert train(Recipe.load(file), resume=True, terminal=False).result is not None


def test_out_of_memory_under_a_budget_advises_a_smaller_one(recipe_file: RecipeFile) -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"You can start again with a training\.memory below 8GiB, or start"
    ):
        with out_of_memory_explained(Recipe.load(recipe_file(training={"memory": "8GiB"}))):
            raise MemoryError


@pytest.mark.parametrize("plan", [None, {"micro_batch_size": 4}])
def test_no_flipped_character_of_the_run_s_file_changes_it_silently(
    recipe_file: RecipeFile, tmp_path: Path, plan: dict[str, Any] | None
) -> None:
    recipe = Recipe.load(recipe_file())
    run = claim(recipe, tmp_path / "run", resume=False, fresh=False, plan=plan)
    with checkpoint.writing(run.path, 1, run.run_id) as folder:
        checkpoint.write_state(folder, {"step": 1, "plan": plan})
    file = run.path / "run.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert earlier_run_id(run.path) == run.run_id
    shutil.rmtree(run.path / "checkpoints")


def test_an_object_without_a_checksum_is_of_an_earlier_version() -> None:
    assert without_checksum({"run_id": "a"}) == {"run_id": "a"}
    assert without_checksum(json.loads(json.dumps(with_checksum({"loss": 0.1})))) == {"loss": 0.1}
    ranks = {"ranks": {2: 1, 10: 2}}  # keys become text in the file
    assert without_checksum(json.loads(json.dumps(with_checksum(ranks)))) == {"ranks": {"2": 1, "10": 2}}
    with pytest.raises(ValueError, match="checksum differs"):
        without_checksum({**with_checksum({"loss": 0.1}), "loss": 0.2})


def test_ctrl_c_in_the_first_import_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "qlora.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "qlora.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "qlora: interrupted\n"


def test_ctrl_c_at_the_very_end_changes_no_exit_code(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import atexit, os, signal, sys\n"
        "from qlora import __main__, cli\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGINT): kill(own, number)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.late = Late()\n"
        "sys.argv = ['qlora', '--version']\n"
        "__main__.main()\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "late.py"], check=False, capture_output=True, text=True, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("qlora")


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(Recipe, "load", lambda *_: signal.raise_signal(number))
    done = qlora("check", "quickstart")
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.splitlines()[-1] == "qlora: interrupted"


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_import_that_a_signal_broke_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, wrapped: bool
) -> None:
    """numpy's import loses the exception of a signal, is tried again, and then fails with RecursionError."""
    (tmp_path / "lost.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal({number})\nexcept BaseException:\n    pass\n"
        "raise RecursionError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def importing() -> None:
        monkeypatch.delitem(sys.modules, "lost", raising=False)
        try:
            __import__("lost")
        except RecursionError as error:
            if wrapped:
                raise UsageError("no such library") from error
            raise

    monkeypatch.setattr(cli, "app", importing)
    done = qlora("train", "quickstart")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "qlora: interrupted\n")


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("signalled", [False, True])
def test_a_bug_outside_imports_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, signalled: bool) -> None:
    def buggy() -> None:
        if signalled:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        raise RecursionError

    monkeypatch.setattr(cli, "app", buggy)
    with pytest.raises(RecursionError):
        qlora("chat", "run")


@pytest.mark.usefixtures("without_forecast")
@pytest.mark.parametrize("gone", [pytest.param("stdout", marks=pytest.mark.slow), "both"])
def test_a_run_without_a_reader_loses_nothing(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """As with `| true` and `2>&1 | head -1`."""
    file = recipe_file(adapter={"dropout": 0.1})
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["qlora", "train", str(file)])
    with os.fdopen(writer, "w", buffering=1) as pipe, redirect_stdout(pipe):
        with redirect_stderr(pipe if gone == "both" else io.StringIO()):
            handlers = {number: signal.getsignal(number) for number in HANDLED}
            with pytest.raises(SystemExit) as end:
                cli.main()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    run = tmp_path / "run"
    assert end.value.code == 0
    assert (run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()
    assert records(run) == records(whole.run)


def test_a_signal_to_one_process_stops_all() -> None:
    for own, others, code in ((None, 0, None), (None, 15, 15), (15, 0, 15), (1, 15, 15)):
        stop = StopRequest()
        stop.signal_number = own
        assert stop.agreed(lambda number, others=others: max(number, others)) == (code is not None)  # type: ignore[misc]
        assert stop.signal_number == code


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_sigterm_to_one_of_two_processes_ends_both_with_a_checkpoint(
    recipe_file: RecipeFile, tmp_path: Path, signalled: int
) -> None:
    file = recipe_file(training={"max_steps": 500, "eval_every": 2})
    processes = two_ranks(file, tmp_path)
    processes[0].wait_for_step(tmp_path / "run", 3)
    processes[signalled].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    assert "Traceback" not in processes[0].err + processes[1].err
    assert checkpoint.newest(tmp_path / "run") is not None
