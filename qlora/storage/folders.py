"""Folders that are there whole or not at all, and whose they are.

What is written lies beside its place under a `.tmp-` name until a rename commits it; what is removed is renamed aside
to `.trash-` first. So no half of a folder is ever seen under its name, and whoever holds the lock removes what a
killed process left.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qlora.errors import SaveError, UsageError
from qlora.storage.atomic import sync

TEMPORARY, TRASH = ".tmp-", ".trash-"
"""before the name of what is being written, and of what is being removed"""


class InUseError(UsageError):
    """Another process holds a folder."""


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; made if it is missing.

    The lock is the kernel's (flock on `<folder>/.lock`): it goes with the process, however that ends. `wait` for
    another process to let go of it.

    Raises:
        InUseError: another process holds it.
        SaveError: the folder cannot be written.
    """
    with save_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
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
    """Put whatever the body writes in place of the folder `<run>/<name>`, whole or not at all.

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
    """Give folders called `name` (a glob) their names that a kill caught between setting the old one aside and the new.

    The caller holds the lock.

    Raises:
        SaveError: a folder cannot be renamed.
    """
    with save_errors(parent):
        _finish_commits(parent, name)


def clear(run: Path, names: Iterable[str]) -> None:
    """Remove files and folders of a run, and what a killed process left there; no folder is ever half there.

    Raises:
        SaveError: one of them cannot be removed.
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
    """A new folder beside its later place; gone when the body raises."""
    folder = parent / f"{TEMPORARY}{name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(folder: Path, final: Path) -> None:
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


def discard(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    trash = folder.rename(folder.with_name(f"{TRASH}{folder.name}"))
    sync(trash.parent)
    _remove(trash)


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove what a killed process left of folders and files called `name` (a glob), and of nothing else.

    The caller holds the lock, so nobody is writing there.
    """
    _finish_commits(parent, name)
    for prefix in (TEMPORARY, TRASH):
        for path in parent.glob(f"{prefix}{name}"):
            _remove(path)


def _finish_commits(parent: Path, name: str) -> None:
    """Do the second rename of `commit` where a kill came before it: the new folder is whole by then."""
    for aside in parent.glob(f"{TRASH}{name}"):
        own = aside.name.removeprefix(TRASH)
        folder, final = parent / f"{TEMPORARY}{own}", parent / own
        if folder.is_dir() and not (final.exists() or final.is_symlink()):
            folder.rename(final)
            sync(parent)


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
