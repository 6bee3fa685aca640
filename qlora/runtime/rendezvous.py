"""Waits for the other processes of a run: says so, ends after a time, and can be stopped by a signal."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qlora.errors import UsageError
from qlora.runtime.launch import ADVICE

SAID_AFTER_S = 10.0
"""seconds until a process says that it waits"""
ENDED_AFTER_S = 300.0
"""seconds until a process ends, because the others do not come"""


@contextmanager
def awaiting(processes: int, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """Run the body, in which this process waits within a library until all `processes` have come.

    A Python handler of a signal cannot run in the meantime, so SIGINT and SIGTERM get their default action: they end
    the process at once. Nothing has begun that could be saved.

    Args:
        processes: number of processes; with 1 there is nothing to wait for.
        end: ends the process with an exit code.
    """
    if processes == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    come = threading.Event()
    threading.Thread(target=_watch, args=(come, processes, end), daemon=True).start()
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        come.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(come: threading.Event, processes: int, end: Callable[[int], object]) -> None:
    place = f"{os.environ.get('MASTER_ADDR', 'this machine')}:{os.environ.get('MASTER_PORT', '29500')}"
    rank = os.environ.get("RANK", "0")
    if come.wait(SAID_AFTER_S):
        return
    print(f"process {rank} waits for all {processes} processes at {place}", file=sys.stderr, flush=True)
    if come.wait(ENDED_AFTER_S - SAID_AFTER_S):
        return
    print(
        f"qlora: WORLD_SIZE is {processes}, but not all processes came to {place} within {ENDED_AFTER_S:.0f} s. "
        f"{ADVICE}",
        file=sys.stderr,
        flush=True,
    )
    end(UsageError.exit_code)
