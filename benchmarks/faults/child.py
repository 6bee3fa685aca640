"""Run one case in a forked process, with a time limit.

Imports take seconds and a case takes a fraction of one, so a sweep imports the package once and forks for each case.
"""

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HANG = -1000
"""code of a process that reached its time limit"""


@dataclass(frozen=True)
class Ended:
    """The end of a process."""

    code: int
    """exit code, minus the number of the signal that ended it, or HANG"""
    out: str
    err: str
    """standard error; for an exception, its traceback"""

    @property
    def said(self) -> str:
        """Both streams."""
        return self.out + self.err

    @property
    def is_traceback(self) -> bool:
        """True if an exception reached the top."""
        return "Traceback (most recent call last)" in self.err


def command(
    arguments: Sequence[object], seconds: float, *, before: Callable[[], object] = lambda: None
) -> Ended:
    """Run `qlora <arguments>` in a forked process.

    Args:
        arguments: the command line, without the program.
        seconds: time limit.
        before: called in the process before the command, for example to inject an error.
    """

    def run() -> None:
        from qlora.cli import main

        sys.argv = ["qlora", *map(str, arguments)]
        before()
        main()

    return ended(run, seconds)


def ended(case: Callable[[], object], seconds: float) -> Ended:
    """Call `case` in a forked process. A QloraError ends it with its exit code, any other exception with 1."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        child = os.fork()
        if child == 0:
            _run(case, out, err)
        began, pause = time.monotonic(), 0.001
        while time.monotonic() - began < seconds:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return Ended(os.waitstatus_to_exitcode(status), _text(out), _text(err))
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Ended(HANG, _text(out), _text(err))


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _run(case: Callable[[], object], out: Path, err: Path) -> None:
    """Run the case and end the process with its exit code; never return."""
    import torch

    from qlora.errors import QloraError

    # makes torch's pool of threads anew, before several threads of a loading model want to do so at once and fail
    torch.set_num_threads(torch.get_num_threads())

    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    logging.getLogger().handlers.clear()  # a program starts without those of pytest, which would take its warnings
    code = 0
    try:
        case()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except QloraError as error:
        code = error.exit_code
        print(f"qlora: {error}", file=sys.stderr)
    except BaseException:  # noqa: BLE001 - also a panic of a library in Rust
        code = 1
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
