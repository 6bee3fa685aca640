"""Runs code that others wrote, such as a chat template, in a process of its own with limits on time and memory."""

import gc
import json
import os
import resource
import signal
import warnings
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, ParamSpec, TypeVar

from qlora.recipe.sizes import unit_for

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SECONDS = 10.0
MEMORY_BYTES = 2**30


class OutOfBoundsError(Exception):
    """A call took too long or too much memory; the text says which."""


class Bounded(Generic[Arguments, Result]):
    """A function whose calls run in one forked process, which is started by the first call and ends with this one.

    The process is forked, so it has what this one has imported, and it holds none of its files. It ignores the signals
    that a terminal sends to both: it ends when this process does.

    Answers come back as JSON, because the other process runs what others wrote.

    Args:
        function: takes what can be pickled, returns what JSON can hold, and prints nothing.
        errors: exceptions that it raises, each made again from its arguments, which JSON can hold.
        seconds: longest time of a call.
        memory_bytes: most memory that calls can take in addition to that of this process.

    Examples:
        >>> Bounded(len)("text")
        4
    """

    def __init__(
        self,
        function: Callable[Arguments, Result],
        *,
        errors: Sequence[type[Exception]] = (),
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._function, self._errors = function, tuple(errors)
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._pipe: Connection[Any, Any] | None = None
        self._end: Callable[[], object] = lambda: None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the function in the other process.

        Raises:
            OutOfBoundsError: the call took too long or too much memory, or ended the process. The next call starts
                another one.
            Exception: one of `errors`; RuntimeError for any other.
        """
        pipe = self._start() if self._pipe is None else self._pipe
        try:
            pipe.send((args, kwargs))
            if not pipe.poll(self._seconds):
                raise OutOfBoundsError(f"took longer than {self._seconds:g} s")
            kind, value = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._stop()
            raise OutOfBoundsError("took too much memory or too deep a recursion") from error
        except BaseException:
            self._stop()  # an answer could still come, and would be taken for that of the next call
            raise
        if kind == "memory":
            unit = unit_for(self._memory_bytes)
            raise OutOfBoundsError(f"took more than {unit.text(self._memory_bytes)} of memory")
        if kind == "error":
            raise self._errors[value[0]](*value[1])
        if kind == "other":
            raise RuntimeError(value)
        return value

    def _start(self) -> "Connection[Any, Any]":
        ours, theirs = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no lock of other threads
            child = os.fork()
        if child == 0:
            _serve(theirs, self._function, self._errors, self._memory_bytes)
        theirs.close()
        self._pipe, self._end = ours, weakref.finalize(self, _end, child, ours)
        return ours

    def _stop(self) -> None:
        self._end()
        self._pipe = None


def _end(child: int, pipe: "Connection[Any, Any]") -> None:
    pipe.close()
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # this process is itself a fork of the one that started the child


def _serve(
    pipe: "Connection[Any, Any]",
    function: Callable[..., Any],
    errors: tuple[type[Exception], ...],
    memory_bytes: int,
) -> None:
    """Answer calls until the pipe closes; never return."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(
            3, pipe.fileno()
        )  # a copy of the other end would keep it open, and one of a lock the lock
        os.closerange(pipe.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        gc.freeze()  # a collection would touch, and so copy, all pages of the other process
        with open("/proc/self/statm") as file:  # noqa: PTH123
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, resource.RLIM_INFINITY))
        while True:
            args, kwargs = pipe.recv()
            pipe.send_bytes(json.dumps(_answer(function, errors, args, kwargs)).encode())
    finally:  # also at the end of the pipe
        os._exit(0)


def _answer(
    function: Callable[..., Any], errors: tuple[type[Exception], ...], args: Any, kwargs: Any
) -> tuple[str, Any]:
    """Return the kind of an answer and its value: a result; the number and arguments of an error; or a text."""
    try:
        return "result", function(*args, **kwargs)
    except MemoryError:
        return "memory", None
    except errors as error:
        number = next(number for number, kind in enumerate(errors) if isinstance(error, kind))
        return "error", (number, error.__reduce__()[1])
    except Exception as error:  # noqa: BLE001 - raised again in the other process
        return "other", f"{type(error).__name__}: {error}"
