"""Errors in the middle of a run: file operations that fail, and memory that is short. `--resume` must end the run.

The n-th operation of a run raises ENOSPC, EIO or EACCES, or the n-th micro-batch raises as a full memory does. The run
goes on and ends well, or ends with a documented exit code and one message. Resumed without the error, it must end with
the adapter of a run without one.
"""

import errno
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import ground
from benchmarks.faults.child import command
from benchmarks.faults.sweep import SECONDS, Case, Judged, Sweep, judge

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)


def open_errors(shared: Path) -> Case:
    """Train a run without an error, and return the case."""
    ground.import_all()
    base, run = ground.tiny_base(shared / "base"), shared / "run"
    recipe = ground.write_recipe(shared / "recipe.yaml", ground.settings(base, run))
    ground.trained(recipe)
    whole = ground.result_of(run)
    assert whole is not None

    def case(rng: random.Random, folder: Path) -> Judged:
        inject, what = _memory(rng) if rng.random() < 0.25 else _files(rng, run)
        arguments = ["train", recipe, "--quiet"]
        judged = judge(
            command([*arguments, "--fresh"], SECONDS, before=inject),
            [
                str(run.parent),
                "out of memory",
            ],  # the folder above cannot be written either, if its fsync fails
            what,
        )
        if judged.kind not in ("works", "named"):
            return judged
        end = command([*arguments, "--resume"], SECONDS)
        result = ground.result_of(run)
        if end.code or result is None:
            return Judged("not resumed", what, end.said[-1000:])
        return Judged("same", what) if result[0] == whole[0] else Judged("changed", what, end.said[-600:])

    return case


def _files(rng: random.Random, run: Path) -> tuple[Callable[[], None], str]:
    """Return a function that lets a file operation inside the run's folder fail, and the damage in words."""
    at, code = rng.randrange(1, 120), rng.choice(CODES)
    lasting = rng.random() < 0.2

    def inject() -> None:
        done = 0

        def fails(name: Any) -> None:
            nonlocal done
            if not isinstance(name, int) and str(run) not in str(name):
                return
            done += 1
            if done == at or (lasting and done > at):
                raise OSError(code, os.strerror(code), None if isinstance(name, int) else str(name))

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def faulty(*args: Any, **kwargs: Any) -> Any:
                if not (args and isinstance(args[0], int) and args[0] < 3):
                    fails(args[0] if args else "")
                return call(*args, **kwargs)

            return faulty

        for name in OPERATIONS:
            setattr(os, name, wrap(getattr(os, name)))
        io.open = wrap(io.open)

    return inject, f"{errno.errorcode[code]} at file operation {at}{' and all later ones' if lasting else ''}"


def _memory(rng: random.Random) -> tuple[Callable[[], None], str]:
    """Return a function that lets memory be short in a micro-batch, and the damage in words."""
    at = rng.randrange(1, 20)
    error = rng.choice(
        [
            MemoryError(),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("std::bad_alloc"),
        ]
    )

    def inject() -> None:
        from qlora.objective.causal_lm import CausalLM

        done, loss = 0, CausalLM.loss

        def short(self: Any, model: Any, batch: Any) -> Any:
            nonlocal done
            done += 1
            if done == at:
                raise error
            return loss(self, model, batch)

        CausalLM.loss = short  # type: ignore[method-assign]

    return inject, f"{error!r} in micro-batch {at}"


SWEEP = Sweep("errors", "errors injected into runs", 190, open_errors)
