"""A run's folder is claimed whole or not at all, even if the process dies or the disk fills up at any operation."""

import errno
import io
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import RecipeError, SaveError
from qlora.recipe import Recipe
from qlora.storage import folders
from qlora.training import checkpoint
from qlora.training.run_folder import claim, earlier_plan, finished

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SETTINGS: dict[str, Any] = {"base": {"model": "bundled/base"}, "data": {"source": "rows.jsonl"}}
OLD = Recipe.from_dict(SETTINGS)
LONGER = Recipe.from_dict({**SETTINGS, "training": {"max_steps": 7}})
"""the same run with a change that --resume allows"""
NEW = Recipe.from_dict({**SETTINGS, "training": {"seed": 1}})
"""another run"""

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


class Fault:
    """Counts the file operations of this process and lets operation number `at` fail.

    kill: the process dies before it. half: it dies after half of a write. full: it raises ENOSPC.
    """

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at = kind, at
        self.done: list[str] = []

    def __enter__(self) -> "Fault":
        self.patch = pytest.MonkeyPatch()
        for name in OPERATIONS:
            self.patch.setattr(os, name, self.wrap(name, getattr(os, name)))
        self.patch.setattr(io, "open", self.wrap_open(io.open))  # Path.write_text truncates when it opens
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.done.append(name)
            if len(self.done) == self.at:
                if self.kind == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
                if self.kind == "half" and name == "write":
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else call(*args, **kwargs)  # no power failure here

        return faulty

    def wrap_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            opened = call(file, mode, *args, **kwargs)
            try:
                if set(mode) & set("wax+"):
                    self.wrap("open", lambda name: None)(file)
            except OSError:
                opened.close()
                raise
            return opened

        return faulty


def fails(action: Callable[[], object], kind: str, at: int) -> bool:
    """Return True if the action reached operation `at` and failed there as it should."""
    if kind == "full":
        with Fault(kind, at) as fault, suppress(SaveError):
            action()
        return len(fault.done) >= at
    child = os.fork()
    if child == 0:
        try:
            with Fault(kind, at):
                action()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the child must not continue as a second pytest
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the action raised"
    return status == signal.SIGKILL


def every_fault(template: Path, action: Callable[[Path], object], check: Callable[[Path], None]) -> int:
    """Let each operation of an action fail in each way on a copy of a folder, and check the files that are left.

    Returns the number of operations.
    """

    def copied(name: str) -> Path:
        run = template.with_name(name)
        return shutil.copytree(template, run) if template.exists() else run

    undisturbed = copied("undisturbed")
    with Fault("none", 0) as fault:
        action(undisturbed)
    for at, name in enumerate(fault.done, 1):
        for kind in ("kill", "full", *(["half"] if name == "write" else [])):
            run = copied(f"{kind}-{at}")
            assert fails(partial(action, run), kind, at)
            with Fault("none", 0):
                check(run)
            shutil.rmtree(run)
    return len(fault.done)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """Write a run with two checkpoints and a result, that is, with every kind of file."""
    run = claim(OLD, tmp_path / "template", resume=False, fresh=False, plan={"micro_batch_size": 2})
    for step in (2, 4):
        with checkpoint.writing(run.path, step, run.run_id) as folder:
            (folder / "adapter").mkdir()
            (folder / "adapter" / "recipe.yaml").write_text(OLD.to_yaml())
            checkpoint.write_state(folder, {"step": step, "plan": run.plan})
    with folders.replacing(run.path, "adapter") as folder:
        (folder / "adapter_model.safetensors").write_text("the old result")
    run.write_result({"loss_after": 1.0})
    (run.path / "metrics.jsonl").write_text("old")
    return run.path


def identity(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["run_id"])


def check_old_run(run: Path, run_id: str) -> None:
    """Assert that the run still has its identity and all its files."""
    assert identity(run) == run_id
    for step in (2, 4):
        assert checkpoint.verify(run / "checkpoints" / f"step-{step:06d}", run_id=run_id) == []
    assert earlier_plan(run) == {"micro_batch_size": 2}
    assert finished(run) == {"loss_after": 1.0, "run_id": run_id}
    assert (run / "adapter" / "adapter_model.safetensors").read_text() == "the old result"


def test_a_new_run_begins_or_can_be_started_again(tmp_path: Path) -> None:
    def check(run: Path) -> None:
        again = claim(OLD, run, resume=True, fresh=False, plan={"micro_batch_size": 4})
        assert identity(run) == again.run_id
        assert Recipe.recorded(run / "recipe.yaml").to_dict() == OLD.to_dict()
        assert {path.name for path in run.iterdir()} == {"run.json", "recipe.yaml"}

    count = every_fault(tmp_path / "none", lambda run: claim(OLD, run, resume=False, fresh=False), check)
    assert count > 10


def test_a_resumed_run_stays_the_same_run(template: Path) -> None:
    before = identity(template)

    def check(run: Path) -> None:
        assert Recipe.recorded(run / "recipe.yaml").to_dict() in (OLD.to_dict(), LONGER.to_dict())
        check_old_run(run, before)
        assert claim(LONGER, run, resume=True, fresh=False).run_id == before
        assert Recipe.recorded(run / "recipe.yaml").to_dict() == LONGER.to_dict()
        check_old_run(run, before)

    count = every_fault(template, lambda run: claim(LONGER, run, resume=True, fresh=False), check)
    assert count >= 5


def test_a_replaced_run_is_entirely_old_or_entirely_new(template: Path) -> None:
    before = identity(template)
    seen = set()

    def check(run: Path) -> None:
        current = identity(run)
        seen.add(current == before)
        with pytest.raises(RecipeError, match=r"--resume.*--fresh"):
            claim(NEW, run, resume=False, fresh=False)
        if current == before:
            check_old_run(run, before)
            assert claim(OLD, run, resume=True, fresh=False).run_id == before
            check_old_run(run, before)
            return
        assert finished(run) is None
        assert claim(NEW, run, resume=True, fresh=False).run_id == current
        assert Recipe.recorded(run / "recipe.yaml").to_dict() == NEW.to_dict()
        assert checkpoint.newest(run) is None
        names = {
            path.name for path in run.iterdir() if not path.name.startswith(".trash-")
        }  # these are reported
        assert names == {"run.json", "recipe.yaml"}

    count = every_fault(template, lambda run: claim(NEW, run, resume=False, fresh=True), check)
    assert seen == {True, False}
    assert count > 30


def test_a_result_or_checkpoint_keeps_its_name_while_it_is_replaced(template: Path) -> None:
    run_id = identity(template)
    (template / "checkpoints" / "step-000004" / "state.json").write_text("damaged")

    def replace(run: Path) -> None:
        with folders.replacing(run, "adapter") as folder:
            (folder / "adapter_model.safetensors").write_text("the new result")
        with checkpoint.writing(run, 4, run_id) as folder:
            checkpoint.write_state(folder, {"step": 4, "again": True})

    def check(run: Path) -> None:
        claim(OLD, run, resume=True, fresh=False)
        assert (run / "adapter" / "adapter_model.safetensors").read_text() in (
            "the old result",
            "the new result",
        )
        assert (run / "checkpoints" / "step-000004").is_dir()
        assert checkpoint.newest(run, run_id=run_id, report=lambda line: None) is not None

    assert every_fault(template, replace, check) > 20


def test_a_run_that_is_being_replaced_can_be_replaced_again(template: Path) -> None:
    at = 1
    while fails(lambda: claim(NEW, template, resume=False, fresh=True), "kill", at):
        at += 1
    assert earlier_plan(template) is None
    assert checkpoint.newest(template) is None
