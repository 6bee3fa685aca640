"""Atomic writing and removal of folders, and locks on them.

A new folder has a `.tmp-` name next to its place until a rename commits it. A folder to remove is first renamed to a
`.trash-` name. So a folder is never seen half written or half removed under its own name, and the process that holds
the lock can remove the leftovers of a killed process. A leftover that cannot be removed, as on NFS while a file in it
is open, is reported and stays; the next folder of its kind gets a name with a number, such as `.tmp-step-000100~2`.
"""

import errno
import fcntl
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qlora.errors import SaveError, UsageError
from qlora.storage.atomic import sync

TEMPORARY, TRASH = ".tmp-", ".trash-"
"""prefixes of the name of a folder or file that is being written or removed"""

_NUMBER = re.compile(r"~(\d+)$")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it
_reported = set[Path]()


class InUseError(UsageError):
    """Another process holds the lock of a folder."""


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    The lock is an flock on `<folder>/.lock`: the kernel releases it when the process ends, even if it is killed.

    Args:
        folder: the folder to lock.
        wait: wait until another process releases the lock.

    Raises:
        InUseError: another process holds the lock.
        SaveError: the folder cannot be written.
    """
    with save_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW: a planted link must not empty the file that it leads to
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = os.fdopen(descriptor, "r+")
    with file:
        with save_errors(folder):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise InUseError(
                    f"{folder} is in use by process {holder}. Wait for it to end, or choose another output=..."
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


@contextmanager
def replacing(run: Path, name: str) -> Iterator[Path]:
    """Replace the folder `<run>/<name>` atomically by the folder that the body writes to the yielded path.

    Raises:
        SaveError: a file cannot be written; the old folder stays.
    """
    with save_errors(run / name):
        remove_leftovers(run, name)
        with temporary(run, name) as folder:
            yield folder
            fsync_tree(folder)
            commit(folder, run / name)


def recover(parent: Path, name: str) -> None:
    """Finish commits of folders called `name` (a glob) that a kill interrupted between the two renames.

    The caller holds the lock.

    Raises:
        SaveError: a folder cannot be renamed.
    """
    with save_errors(parent):
        _finish_commits(parent, name)


def clear(run: Path, names: Iterable[str]) -> None:
    """Remove files and folders of a run, and leftovers of killed processes; each folder is removed atomically.

    Raises:
        SaveError: a file or folder cannot be removed.
    """
    with save_errors(run):
        for name in names:
            remove_leftovers(run, name)
            path = run / name
            if path.is_dir() and not path.is_symlink():
                discard(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def temporary(parent: Path, name: str) -> Iterator[Path]:
    """Make a temporary folder next to its later place, and remove it if the body raises."""
    folder = _unused(parent / f"{TEMPORARY}{name}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(folder: Path, final: Path) -> None:
    """Rename a finished folder to `final`, and remove what had this name before."""
    aside = _unused(final.with_name(f"{TRASH}{final.name}"))
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


def discard(folder: Path) -> None:
    """Remove a folder atomically: rename it first, so that it is never seen half removed."""
    trash = folder.rename(_unused(folder.with_name(f"{TRASH}{folder.name}")))
    sync(trash.parent)
    _remove(trash)


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove leftovers of killed processes that wrote folders and files called `name` (a glob), and only those.

    The caller holds the lock, so no other process is writing there.
    """
    _finish_commits(parent, name)
    for prefix in (TEMPORARY, TRASH):
        for path in _leftovers(parent, f"{prefix}{name}"):
            _remove(path)


def without_number(name: str) -> str:
    """Return the name of a leftover without the number that tells it from another one."""
    return _NUMBER.sub("", name)


def _leftovers(parent: Path, name: str) -> list[Path]:
    """Return the paths called `name` (a glob), with or without a number, the newest last."""
    found = {*parent.glob(name), *parent.glob(f"{name}~*")}
    return sorted(found, key=lambda path: int(number[1]) if (number := _NUMBER.search(path.name)) else 1)


def _unused(path: Path) -> Path:
    """Return `path`, or this name with the first number above those of the leftovers that could not be removed."""
    if not os.path.lexists(path):
        return path
    return next(
        numbered
        for number in itertools.count(2)
        if not os.path.lexists(numbered := path.with_name(f"{path.name}~{number}"))
    )


def _finish_commits(parent: Path, name: str) -> None:
    """Do the second rename of `commit` if a kill prevented it; the new folder is complete by then."""
    for aside in _leftovers(parent, f"{TRASH}{name}"):
        final = parent / without_number(aside.name.removeprefix(TRASH))
        folders = [path for path in _leftovers(parent, f"{TEMPORARY}{final.name}") if path.is_dir()]
        if folders and not (final.exists() or final.is_symlink()):
            folders[-1].rename(final)
            sync(parent)


def _remove(path: Path) -> None:
    """Remove a leftover, or report once that it stays: it takes space, but no run depends on its removal."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        if path not in _reported:
            _reported.add(path)
            logging.getLogger("qlora").warning(
                f"{path} could not be removed: {error.strerror or error}. Nothing needs it; remove it when you can"
            )


def fsync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk, so that it survives a power cut."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def save_errors(path: Path) -> Iterator[None]:
    """Raise a SaveError, with the path and the reason, for an OSError or SafetensorError of the body."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write {where}: {reason}{_free_space(path, error.errno)}") from error
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        number = _OS_ERROR.search(str(error))
        reason = str(error) if number is None else os.strerror(int(number[1]))
        raise SaveError(
            f"cannot write {path}: {reason}{_free_space(path, number and int(number[1]))}"
        ) from error


def _free_space(path: Path, reason: int | None) -> str:
    """Return a note on the free disk space if a full disk can be the reason; else an empty text."""
    if reason not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f" ({free_bytes(path) / 2**30:.2f} GiB free there)"


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which does not need to exist."""
    existing = next(parent for parent in (path, *path.parents, Path()) if parent.exists())
    return shutil.disk_usage(existing).free
