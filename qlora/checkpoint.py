"""Checkpoints that are there whole or not at all, and that prove it when they are read.

    runs/<name>/checkpoints/step-000100/   any files, then manifest.json: run, step, sizes and SHA-256 of them

Written beside its place under a `.tmp-` name: files, fsync, manifest, fsync, rename, fsync of the parent. The
rename is the commit; what a kill or a power cut leaves behind has no manifest that fits and is never loaded.
safetensors knows neither checksum nor fsync; the manifest and this order supply both. Nothing is pickled:
tensors are safetensors, the rest is JSON.

One process writes a run's folder at a time; `lock` makes sure of it.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qlora import manifest
from qlora.atomic import sync
from qlora.errors import ModelError, SaveError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY, TRASH = ".tmp-", ".trash-"
"""before the name of what is being written, and of what is being removed"""

_warn = logging.getLogger("qlora").warning


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run's folder for this process; made if it is missing.

    The lock is the kernel's (flock on `<run>/.lock`): it goes with the process, however that ends.

    Raises:
        ModelError: another process holds it.
        SaveError: the folder cannot be written.
    """
    with save_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("a+")
    with file:
        with save_errors(run):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ModelError(
                    f"{run} is in use by process {holder}. Wait for it to end, or choose another output=..."
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


@contextmanager
def writing(run: Path, step: int, run_id: str) -> Iterator[Path]:
    """Commit whatever the body writes into the folder it is given, as the checkpoint of `step`.

        with writing(run, 100, run_id) as folder:
            save_tensors(folder / "optimizer.safetensors", optimizer.state())

    The body may make subfolders. When it raises, nothing of it remains. A whole checkpoint of the same step
    and run is kept as it is; a damaged one is replaced.

    Raises:
        SaveError: a file cannot be written; names the path and the system's reason.
    """
    checkpoints = run / "checkpoints"
    final = checkpoints / f"step-{step:06d}"
    with save_errors(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(checkpoints)
        with _temporary(checkpoints, final.name) as folder:
            yield folder
            manifest.write(folder, run_id=run_id, step=step)
            fsync_tree(folder)
            if not (final.exists() and not verify(final, run_id=run_id)):
                _commit(folder, final)
        sync(run)  # `checkpoints` itself may be new


@contextmanager
def replacing(run: Path, name: str) -> Iterator[Path]:
    """Put whatever the body writes in place of the folder `<run>/<name>`, whole or not at all.

    Raises:
        SaveError: a file cannot be written; the old folder stays.
    """
    with save_errors(run / name):
        _remove_leftovers(run)
        with _temporary(run, name) as folder:
            yield folder
            fsync_tree(folder)
            _commit(folder, run / name)


def recover(run: Path) -> None:
    """Give the folders their names that a kill caught in between: the old one set aside, the new one not yet in place.

    The caller holds the run's lock.

    Raises:
        SaveError: a folder cannot be renamed.
    """
    with save_errors(run):
        for parent in (run, run / "checkpoints"):
            _finish_commits(parent)


def clear(run: Path, names: Iterable[str]) -> None:
    """Remove files and folders of a run, and what a killed process left there; no folder is ever half there.

    Raises:
        SaveError: one of them cannot be removed.
    """
    with save_errors(run):
        _remove_leftovers(run)
        for path in (run / name for name in names):
            if path.is_dir() and not path.is_symlink():
                _discard(path)
            else:
                path.unlink(missing_ok=True)


def newest(
    run: Path,
    *,
    run_id: str | None = None,
    checksums: bool = True,
    report: Callable[[str], object] = _warn,
) -> Path | None:
    """The newest checkpoint whose manifest fits its files; None where there are none.

    Args:
        run: the run's folder.
        run_id: only checkpoints of this run count, when given.
        checksums: see `verify`.
        report: called with a line for every newer checkpoint that had to be passed over.

    Raises:
        ModelError: there are checkpoints, but none is whole. Never a silent start from step 0.
    """
    rejected: list[str] = []
    for folder in reversed(_folders(run)):
        problems = verify(folder, run_id=run_id, checksums=checksums)
        if not problems:
            for line in rejected:
                report(f"checkpoint passed over: {line}; going on from {folder.name}")
            return folder
        rejected.append(f"{folder}: {'; '.join(problems)}")
    if rejected:
        raise ModelError(
            "every checkpoint of this run is damaged:\n  " + "\n  ".join(rejected) + "\n"
            "Restore one from a copy, or start again with --fresh"
        )
    return None


def verify(folder: Path, *, run_id: str | None = None, checksums: bool = True) -> list[str]:
    """What is wrong with a checkpoint; an empty list when it is exactly as it was written.

    `checksums=False` compares sizes only, which finds everything but changed bytes without reading the files.
    Files the manifest does not name are no problem: nothing reads them.
    """
    try:
        written = manifest.read(folder)
    except (OSError, ValueError) as error:
        return [f"file {manifest.MANIFEST}: {getattr(error, 'strerror', None) or error}"]
    problems = []
    if written["step"] != _step(folder):
        problems.append(f"file {manifest.MANIFEST}: belongs to step {written['step']}")
    if run_id is not None and written["run_id"] != run_id:
        problems.append(f"file {manifest.MANIFEST}: belongs to run {written['run_id']}, not {run_id}")
    return problems + manifest.problems(folder, written, checksums=checksums)


def rotate(run: Path, keep: int, run_id: str) -> list[Path]:
    """Remove the oldest checkpoints of this run so that `keep` whole ones remain; returns the removed.

    Call it after a commit only. Folders of other runs and damaged ones are neither removed nor counted.

    Raises:
        SaveError: a folder cannot be removed.
    """
    assert keep >= 1
    own = [folder for folder in _folders(run) if not verify(folder, run_id=run_id, checksums=False)]
    for folder in own[:-keep]:
        with save_errors(folder):
            _discard(folder)
    return own[:-keep]


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write named tensors of any device to a safetensors file."""
    from safetensors.torch import save_file

    with save_errors(path):
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """The named tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: missing or not a safetensors file.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write counters and other plain values to `<folder>/state.json`."""
    with save_errors(folder / "state.json"):
        (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        ModelError: missing or not a JSON object.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'state.json'}: cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{folder / 'state.json'}: not a JSON object")
    return state


def _folders(run: Path) -> list[Path]:
    """Committed checkpoints, whole or not, oldest first."""
    return sorted(
        (f for f in (run / "checkpoints").glob("step-*") if f.is_dir() and _step(f) >= 0), key=_step
    )


def _step(folder: Path) -> int:
    """The step in a checkpoint's name; -1 for a name that is none of ours."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


@contextmanager
def _temporary(parent: Path, name: str) -> Iterator[Path]:
    """A new folder beside its later place; gone when the body raises."""
    folder = parent / f"{TEMPORARY}{name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commit(folder: Path, final: Path) -> None:
    """Give a finished folder its name, setting aside what has it now."""
    aside = final.with_name(f"{TRASH}{final.name}")
    replaces = final.exists() or final.is_symlink()
    if replaces:
        final.rename(aside)
    try:
        folder.rename(final)
    except OSError:
        if replaces:
            aside.rename(final)
        raise
    sync(final.parent)
    if replaces:
        _remove(aside)


def _discard(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    trash = folder.rename(folder.with_name(f"{TRASH}{folder.name}"))
    sync(trash.parent)
    _remove(trash)


def _finish_commits(parent: Path) -> None:
    """Do the second rename of `_commit` where a kill came before it: the new folder is whole by then."""
    for aside in parent.glob(f"{TRASH}*"):
        name = aside.name.removeprefix(TRASH)
        folder, final = parent / f"{TEMPORARY}{name}", parent / name
        if folder.is_dir() and not (final.exists() or final.is_symlink()):
            folder.rename(final)
            sync(parent)


def _remove_leftovers(parent: Path) -> None:
    """Remove what a killed process left; the caller holds the run's lock, so nobody is writing there."""
    _finish_commits(parent)
    for prefix in (TEMPORARY, TRASH):
        for path in parent.glob(f"{prefix}*"):
            _remove(path)


def _remove(path: Path) -> None:
    with _naming(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fsync_tree(folder: Path) -> None:
    """Make a folder and all in it survive a power cut."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path into errors of calls that know a descriptor or a bare name only."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def save_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a failed write into a SaveError."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write {where}: {reason}{_free_space(path, error.errno)}") from error
    except SafetensorError as error:  # its writer reports a full disk in its own way
        raise SaveError(f"cannot write {path}: {error}{_free_space(path, errno.ENOSPC)}") from error


def _free_space(path: Path, reason: int | None) -> str:
    """The free space, where the lack of it may be the reason."""
    if reason not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    existing = next(parent for parent in (path, *path.parents, Path()) if parent.exists())
    return f" ({shutil.disk_usage(existing).free / 2**30:.2f} GiB free there)"
