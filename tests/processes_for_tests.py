"""Runs `qlora ...` in processes that tests can kill.

They are forked from a process that has imported everything: imports take seconds, and the tests that kill runs start
many processes.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["imported_for_tests"])


def _start_server() -> None:
    """Start the process to fork from, with our sys.path: the fork server of Python 3.11 does not inherit it."""
    here = str(Path(__file__).parent)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join([here, *sys.path])):
        ensure_running()


class Process:
    """A running `qlora ...` process with one thread, like the tests: rounding depends on the number of threads."""

    def __init__(
        self, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process. `folder` receives its output; `environment` is added to the environment of the tests."""
        _start_server()
        name = f"{time.monotonic_ns()}"
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        environment = {**os.environ, **(environment or {})}
        given = (["qlora", *map(str, arguments)], str(self._out), str(self._err), environment)
        self._process = _CONTEXT.Process(target=run, args=given)
        self._process.start()

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._err.read_text() if self._err.exists() else ""

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = 100) -> int:
        """Wait for the end of the process. Return the exit code, or minus the number of the signal that ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            pytest.fail(f"not done after {seconds} s: {self.out}{self.err}")
        return self._process.exitcode

    def wait_for_step(self, run_folder: Path, step: int) -> None:
        """Wait until the run's metrics contain this step."""
        file, deadline = run_folder / "metrics.jsonl", time.monotonic() + 100
        while time.monotonic() < deadline and self._process.is_alive():
            if file.is_file() and f'"step": {step},' in file.read_text():
                return
            time.sleep(0.005)
        pytest.fail(f"did not reach step {step}: {self.out}{self.err}")


def run(arguments: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    """Become `qlora` (runs in the forked process)."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = arguments
    import torch

    # torch recreates its thread pool on first use in a forked process; two threads doing so at once would collide
    torch.set_num_threads(1)
    from qlora.cli import main

    main()


def two_ranks(file: Path, folder: Path) -> list[Process]:
    """Start `qlora train` in two processes with the variables that a launcher sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        Process("train", file, folder=folder, environment={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
