"""Checkpoints are whole or absent, whatever happens to the process, the disk or the bytes."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import RUN_ID, contents, hidden, save

from qlora.errors import SaveError, UsageError
from qlora.storage import folders
from qlora.training import checkpoint

# Writing and reading


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "view": torch.arange(12).bfloat16()[2:8],
        "transposed": torch.randn(4, 6).T,
        "codes": torch.arange(256, dtype=torch.uint8),
        "steps": torch.tensor(7),
    }
    with checkpoint.writing(tmp_path, 100, RUN_ID) as folder:
        checkpoint.save_tensors(folder / "optimizer.safetensors", tensors)
        checkpoint.write_state(folder, {"step": 100, "loss_before": 1.5, "data": "é"})
    newest = checkpoint.newest(tmp_path, run_id=RUN_ID)
    assert newest == tmp_path / "checkpoints" / "step-000100"
    assert checkpoint.read_state(newest) == {"step": 100, "loss_before": 1.5, "data": "é"}
    loaded = checkpoint.load_tensors(newest / "optimizer.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_manifest_names_run_step_and_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["run_id"], manifest["step"]) == (RUN_ID, 20)
    assert manifest["files"].keys() == {"adapter/adapter_config.json", "weights.bin", "state.json"}
    assert manifest["files"]["weights.bin"]["bytes"] == 40


def test_without_checkpoints_there_is_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-notes").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_has_the_highest_step_whatever_its_name_or_time(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999, 5):
        save(tmp_path, step)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-1000000"


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")]
)
def test_a_body_that_raises_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    before = contents(save(tmp_path, 1))

    def fail() -> None:
        with checkpoint.writing(tmp_path, 2, RUN_ID) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(SaveError if isinstance(error, OSError) else type(error)):
        fail()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert contents(tmp_path / "checkpoints" / "step-000001") == before


def test_saving_a_step_again_keeps_a_whole_checkpoint_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    inode = folder.stat().st_ino
    save(tmp_path, 3)
    assert folder.stat().st_ino == inode
    (folder / "weights.bin").write_bytes(b"")
    save(tmp_path, 3)
    assert checkpoint.verify(folder) == []
    assert hidden(tmp_path) == []
    with checkpoint.writing(tmp_path, 3, "another run") as again:
        (again / "other").write_text("x")
    assert contents(folder).keys() == {"other", "manifest.json"}


def test_the_module_imports_no_torch() -> None:
    code = "import qlora.training.checkpoint, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_files_are_synced_before_the_rename_and_the_rename_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        done.append(f"rename to {Path(target).relative_to(tmp_path)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    folder = save(tmp_path, 1)
    committed = done.index("rename to checkpoints/step-000001")
    temporary = "checkpoints/.tmp-step-000001"
    files = [*folder.rglob("*"), folder]
    assert {str(Path(temporary) / file.relative_to(folder)) for file in files} == set(done[:committed])
    assert done[committed - 1] == temporary
    assert done[committed + 1 :] == ["checkpoints", "."]


# Every disk operation fails in turn


class Faults:
    """Counts the operations that change the disk; operation number `fail_at` raises an error instead of running."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.count, self.fail_at, self.code = 0, -1, code
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(io, "open", self.wrap(io.open))

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            if call is not OPEN or "w" in (args[1:2] or ("r",))[0]:
                self.count += 1
                if self.count == self.fail_at:
                    raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return call(*args, **kwargs)

        return faulty


OPEN = io.open


def save_and_rotate(run: Path, step: int) -> None:
    save(run, step)
    checkpoint.rotate(run, 2, RUN_ID)


def failure(run: Path, step: int) -> str | None:
    """Return the message of a SaveError, None without an error; any other exception is a bug."""
    try:
        save_and_rotate(run, step)
    except SaveError as error:
        return str(error)
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_any_failing_operation_leaves_a_whole_checkpoint_and_a_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    template = tmp_path / "template"
    save(template, 1)
    save(template, 2)
    with monkeypatch.context() as patch:
        faults = Faults(patch, code)
        save_and_rotate(shutil.copytree(template, tmp_path / "dry"), 3)
    assert faults.count > 20, "the writer does not use the faulty functions"
    failures = 0
    for at in range(1, faults.count + 1):
        run = tmp_path / f"run-{at}"
        shutil.copytree(template, run)
        with monkeypatch.context() as patch:
            faults = Faults(patch, code)
            faults.fail_at = at
            message = failure(run, 3)
        if message is not None:  # None: the failure was in the cleanup of a temporary folder
            assert message.startswith(f"cannot write {run}"), at
            assert os.strerror(code) in message, at
            assert ("GiB free" in message) == (code in (errno.ENOSPC, errno.EDQUOT)), at
            failures += 1
        newest = checkpoint.newest(run, run_id=RUN_ID)
        assert newest is not None
        assert newest.name in ("step-000002", "step-000003"), at
        save_and_rotate(run, 4)  # and the next save works
        assert checkpoint.newest(run) == run / "checkpoints" / "step-000004"
        assert hidden(run) == [], at
        shutil.rmtree(run)
    assert failures > 15


def test_a_file_size_limit_raises_a_save_error_and_does_not_kill(tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from qlora.storage import folders
from qlora.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with checkpoint.writing(Path({str(tmp_path)!r}), 1, "id") as folder:
    (folder / "big").write_bytes(bytes(2000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"SaveError: cannot write {tmp_path}/checkpoints: File too large" in done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_path_that_cannot_be_a_folder_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(SaveError, match="checkpoints: File exists") as caught:
        save(tmp_path, 1)
    assert caught.value.exit_code == 74


# SIGKILL

SAVER = """
import itertools, sys, time
from pathlib import Path
from qlora.storage import folders
from qlora.training import checkpoint
run = Path(sys.argv[1])
with folders.lock(run):
    newest = checkpoint.newest(run)
    first = 0 if newest is None else checkpoint.read_state(newest)["step"]
    print("ready", flush=True)
    for step in itertools.count(first + 1):
        with checkpoint.writing(run, step, "id") as folder:
            for name in "abcd":
                (folder / name).write_bytes(bytes([step % 256]) * 100_000)
            checkpoint.write_state(folder, {"step": step})
        checkpoint.rotate(run, 2, "id")
"""


def test_after_a_kill_at_any_time_the_newest_is_whole_and_the_run_continues(tmp_path: Path) -> None:
    chance = random.Random(0)
    reached, interrupted = 0, 0
    for attempt in range(60):
        if attempt >= 12 and interrupted >= 3:  # on a busy machine, more kills miss a save
            break
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.communicate()
        interrupted += bool((tmp_path / "checkpoints").exists() and hidden(tmp_path))
        newest = checkpoint.newest(tmp_path, run_id="id", report=lambda line: pytest.fail(line))
        if newest is not None:
            step = checkpoint.read_state(newest)["step"]
            assert step >= reached
            assert (newest / "a").read_bytes() == bytes([step % 256]) * 100_000
            reached = step
    assert reached >= 2
    assert interrupted >= 3, "too few kills hit a save"


# Rotation


def test_rotation_keeps_the_newest_and_removes_only_whole_ones_of_its_run(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    other = save(tmp_path, 6, run_id="another")
    damaged = tmp_path / "checkpoints" / "step-000004"
    (damaged / "weights.bin").write_bytes(b"short")
    removed = checkpoint.rotate(tmp_path, 2, RUN_ID)
    assert [path.name for path in removed] == ["step-000001", "step-000002"]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000003", "step-000004", "step-000005", other.name]
    assert checkpoint.rotate(tmp_path, 2, RUN_ID) == []


# Replacing a result


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with folders.replacing(tmp_path, "adapter") as folder:
            (folder / "file").write_text(text)
        assert contents(tmp_path / "adapter") == {"file": text.encode()}

    def fail() -> None:
        with folders.replacing(tmp_path, "adapter") as folder:
            (folder / "file").write_text("three")
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        fail()
    assert contents(tmp_path) == {"adapter/file": b"two"}


def test_any_failing_operation_leaves_the_old_result_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with folders.replacing(tmp_path, "adapter") as folder:
            for name in "ab":
                (folder / name).write_text(text)

    write("old")
    for at in range(1, 30):
        with monkeypatch.context() as patch:
            faults = Faults(patch, errno.EIO)
            faults.fail_at = at
            with contextlib.suppress(SaveError):
                write("new")
        texts = set(contents(tmp_path / "adapter").values())
        assert texts in ({b"old"}, {b"new"}), at
        write("old")
    assert faults.count < faults.fail_at, "some operation never failed"


# The lock


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    code = """
import sys, time
from pathlib import Path
from qlora.storage import folders
from qlora.training import checkpoint
with folders.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_until_its_process_ends(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(UsageError, match=f"in use by process {holder.pid}") as caught:
        with folders.lock(tmp_path):
            pass
    assert caught.value.exit_code == 2
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with folders.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with folders.lock(tmp_path):  # released at the end of the block
        pass


def test_the_lock_makes_the_folder(tmp_path: Path) -> None:
    with folders.lock(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="file"):
        with folders.lock(tmp_path / "file"):
            pass
