"""A process whose partners do not come says so, ends after a time, and can be stopped by a signal."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from qlora.runtime import rendezvous
from qlora.runtime.rendezvous import awaiting


def test_a_process_alone_waits_for_none_and_signals_stay_handled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "SAID_AFTER_S", 0.05)
    monkeypatch.setattr(rendezvous, "ENDED_AFTER_S", 0.1)
    before = signal.getsignal(signal.SIGINT)
    ended: list[int] = []
    with awaiting(1, ended.append):
        assert signal.getsignal(signal.SIGINT) == before
        time.sleep(0.2)
    with awaiting(2, ended.append):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the others come at once
    time.sleep(0.2)
    assert signal.getsignal(signal.SIGINT) == before
    assert ended == []
    assert capsys.readouterr().err == ""


def test_missing_processes_are_named_and_end_the_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "SAID_AFTER_S", 0.05)
    monkeypatch.setattr(rendezvous, "ENDED_AFTER_S", 0.1)
    monkeypatch.setenv("MASTER_PORT", "1234")
    ended: list[int] = []
    with awaiting(2, ended.append):
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    assert ended == [2]
    waits, missing = capsys.readouterr().err.splitlines()
    assert waits.startswith("process 0 waits for all 2 processes at ")
    assert "WORLD_SIZE is 2, but not all processes came to" in missing
    assert ":1234 within" in missing


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGINT])
def test_a_real_rendezvous_ends(number: signal.Signals | None) -> None:
    code = """
import sys
from qlora.recipe import Recipe
from qlora.runtime import rendezvous
from qlora.runtime.distributed import DataParallel
rendezvous.SAID_AFTER_S, rendezvous.ENDED_AFTER_S = 0.5, float(sys.argv[1])
DataParallel.of(Recipe.load("quickstart", ["training.device=cpu"]))
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip
    command = [sys.executable, "-c", code, "2" if number is None else "100"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if number is not None and "waits for all 2 processes" in line:
            process.send_signal(number)
    assert process.wait(60) == (2 if number is None else -number), "".join(lines)
    process.stderr.close()
    assert ("not all processes came" in lines[-1]) == (number is None)
