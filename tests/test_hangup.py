"""A closed terminal or a reader that goes away costs no step and changes no exit code."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qlora import cli
from qlora.recipe import Recipe
from qlora.runtime.signals import StopRequest
from qlora.training import checkpoint
from qlora.training.train import train

RecipeFile = Callable[..., Path]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.usefixtures("without_forecast")
def test_after_a_closed_terminal_the_run_resumes_to_the_same_adapter(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    file = recipe_file(
        adapter={"dropout": 0.1},
        training={"max_steps": 80, "epochs": 20, "eval_every": 1, "samples": 1, "sample_tokens": 2},
    )
    master, terminal = pty.openpty()

    def lead_the_session() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # independent of the tests' own SIGHUP setting

    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", "train", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lead_the_session,
    )
    os.close(terminal)
    os.set_blocking(master, False)
    shown = b""
    record = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (record.is_file() and '"step": 3,' in record.read_text()):
        assert time.monotonic() < deadline, shown.decode()
        assert process.poll() is None, shown.decode()
        with suppress(BlockingIOError):
            shown += os.read(master, 65536)
        time.sleep(0.01)
    os.close(master)
    assert process.wait(timeout=100) == 128 + signal.SIGHUP
    assert "/80" in shown.decode(), "the progress bar was shown"

    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert 3 <= checkpoint.read_state(newest)["step"] < 80
    shorter = ["training.max_steps=" + str(checkpoint.read_state(newest)["step"] + 2)]
    resumed = train(Recipe.load(file, shorter), resume=True, terminal=False)
    whole = train(Recipe.load(file, [*shorter, f"output={tmp_path / 'whole'}"]), terminal=False)
    assert (resumed.run / ADAPTER).read_bytes() == (whole.run / ADAPTER).read_bytes()


@pytest.fixture
def hangup_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_ignored")
def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal_number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGHUP))
    cli.main()


def test_a_hangup_before_the_first_step_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, lambda number, frame: None)
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGHUP))
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end.value.code == 129


def code_without_reader(kind: str, *arguments: str) -> tuple[int, str]:
    """Return a command's exit code and the text on the other stream, if its output has no reader."""
    if kind == "terminal":
        reader, writer = pty.openpty()
    else:
        reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": writer, "stderr": subprocess.PIPE}
    if "missing" in arguments:
        streams = {"stdout": subprocess.PIPE, "stderr": writer}
    command = [sys.executable, "-m", "qlora", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, text=True, env=buffered, **streams)  # type: ignore[call-overload]
    os.close(writer)
    out, err = process.communicate(timeout=60)
    return process.returncode, (out or "") + (err or "")


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_without_a_reader_a_command_has_the_same_exit_code(kind: str) -> None:
    assert code_without_reader(kind, "recipes", "schema") == (0, "")
    assert code_without_reader(kind, "recipes", "list") == (
        0,
        "",
    )  # so short that it is flushed only at exit
    assert code_without_reader(kind, "check", "missing") == (2, "")


def test_output_that_does_not_fit_on_the_disk_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "qlora", "recipes", "schema"]
        assert subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False).returncode != 0
