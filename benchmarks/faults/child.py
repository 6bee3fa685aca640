"""Run one case in a forked process, with a time limit."""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable


def outcome_of(case: Callable[[], object], seconds: float) -> tuple[str, str]:
    """Run `case` in a forked process; return what came of it and what it said.

    Returns:
        (kind, text). The kind is done, user error (a QloraError; the text is its message), traceback (any other
        exception), killed (by a signal) or hang.
    """
    with tempfile.NamedTemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            _run(case, said.name)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                kinds = {0: "done", 3: "user error", 4: "traceback"}
                return kinds.get(os.waitstatus_to_exitcode(status), "killed"), said.read()
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang", said.read()


def _run(case: Callable[[], object], said: str) -> None:
    """Run the case and end the process with the code of its outcome; never return."""
    from qlora.errors import QloraError

    code = 0
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        case()
    except QloraError as error:
        code = 3
        _write(said, str(error))
    except BaseException:  # noqa: BLE001 - also a panic of a library in Rust
        code = 4
        _write(said, traceback.format_exc())
    os._exit(code)


def _write(file: str, text: str) -> None:
    with open(file, "w") as stream:  # noqa: PTH123 - as little as possible in a forked process
        stream.write(text)
