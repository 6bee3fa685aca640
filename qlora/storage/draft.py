"""Atomic creation of a result folder at a path that the user chooses.

(In a run's own folder, use `folders.replacing`, which also removes leftovers of earlier processes. That must not happen
in a folder of the user.)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import UsageError
from qlora.storage.atomic import sync
from qlora.storage.folders import TEMPORARY, fsync_tree, lock, save_errors


def check_absent(final: Path) -> None:
    """Raise UsageError if `final` exists; an empty folder is allowed."""
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise UsageError(f"{final}: already exists; choose another place, or remove it")


@contextmanager
def drafting(final: Path) -> Iterator[Path]:
    """Make a hidden folder for drafts next to `final`, on the same disk, and remove it in the end.

    Leftovers of a killed process that wrote the same place are removed first.

    Raises:
        UsageError: `final` exists, or another process is writing it.
        SaveError: the folder cannot be made.

    Examples:
        with drafting(Path("models/mine")) as drafts:
            write(drafts / "first")
            publish(drafts / "first", Path("models/mine"))
    """
    check_absent(final)
    drafts = final.with_name(f"{TEMPORARY}{final.name}")
    with lock(drafts):
        try:
            with save_errors(drafts):
                for leftover in drafts.iterdir():
                    if leftover.is_dir():
                        shutil.rmtree(leftover)
            yield drafts
        finally:
            shutil.rmtree(drafts, ignore_errors=True)


def publish(folder: Path, final: Path) -> None:
    """Flush a draft to disk and rename it to `final`.

    Raises:
        UsageError: `final` exists by now.
        SaveError: the draft cannot be written to disk or renamed.
    """
    with save_errors(final):
        fsync_tree(folder)
        check_absent(final)
        folder.rename(final)
        sync(final.parent)
