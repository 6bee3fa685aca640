"""Runs `qlora ...` in the test process, which saves the seconds that a new process spends on imports."""

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from qlora.cli import main

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Done:
    """Exit code and output of a finished command."""

    returncode: int
    stdout: str
    stderr: str


def qlora(*arguments: object, one_stream: bool = False) -> Done:
    """Run `qlora` with these arguments. With `one_stream`, `stdout` has both streams in the order of a terminal."""
    out, code = io.StringIO(), 0
    err = out if one_stream else io.StringIO()
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["qlora", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Done(code, out.getvalue(), "" if one_stream else err.getvalue())
