"""Graceful stop: a signal sets a flag, and the training loop stops at the next step boundary.

The handler only sets the flag, because saving inside a signal handler can corrupt a checkpoint. A second Ctrl-C stops
at once; earlier checkpoints stay intact, because each is committed by a rename.
"""

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

BY_FUNCTION = 256
"""number of a stop that a function of the caller asked for, above every signal"""


def not_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals to handle: without SIGHUP if the process was started to ignore it, as nohup does."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (number == signal.SIGHUP and ignores_hangup)]


class Ending:
    """Signal handler that ends the process: KeyboardInterrupt for SIGINT, SystemExit for others. It keeps the number.

    An import of a library in C can lose the handler's exception, try again and fail with another one, such as
    RecursionError. `broke` tells such an error from a bug.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    def broke(self, error: BaseException) -> bool:
        """Return True if a signal came and the error, or an error behind it, is of an import."""
        behind: BaseException | None = error
        while self.signal_number is not None and behind is not None:
            frames = traceback.walk_tb(behind.__traceback__)
            if any(frame.f_code.co_name == "<module>" for frame, _ in frames):
                return True
            behind = behind.__cause__ or behind.__context__
        return False


class EvaluationStopped(Exception):
    """A signal came in the middle of an evaluation."""


class StopRequest:
    """Context that stores SIGINT, SIGTERM or SIGHUP in `signal_number`, instead of ending the process.

    Outside the main thread, which alone receives signals, it changes nothing.

    Examples:
        with StopRequest() as stop:
            while not stop.signal_number: ...
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> "StopRequest":
        handled = not_ignored(SIGNALS) if threading.current_thread() is threading.main_thread() else []
        self._previous = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """True if a signal came, or a function asked for the end."""
        return self.signal_number is not None

    def by_function(self) -> None:
        """Stop because a function of the caller asked for it."""
        self.signal_number = self.signal_number or BY_FUNCTION

    def agreed(self, highest: Callable[[int], int]) -> bool:
        """Return True if a process of the run was signalled; all processes then stop with its signal.

        highest: returns the highest of the numbers of all processes.
        """
        if number := highest(self.signal_number or 0):
            self.signal_number = number
        return bool(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number in SIGNALS and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
