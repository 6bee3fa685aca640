"""A new folder that is there whole or not at all, for results that users put where they like.

(A run's own folder has `folders.replacing`, which also removes what an earlier process left there: nothing
that may be done in a folder of the user's.)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import UsageError
from qlora.storage.atomic import sync
from qlora.storage.folders import TEMPORARY, fsync_tree, lock, save_errors


def check_absent(final: Path) -> None:
    """Raises UsageError if there is something at `final`; an empty folder is nothing."""
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise UsageError(
            f"{final}: exists already, and nothing is overwritten: choose another place, or remove it"
        )


@contextmanager
def drafting(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, on the same disk, to write into; gone afterwards, come what may.

        with drafting(Path("models/mine")) as drafts:
            write(drafts / "first")
            publish(drafts / "first", Path("models/mine"))

    What a killed process left of an earlier draft of the same place is removed first.

    Raises:
        UsageError: `final` exists, or another process is writing it.
        SaveError: the folder cannot be made.
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
    """Give a draft its place, in one step, once it is safely on disk.

    Raises:
        UsageError: something has appeared there in the meantime.
        SaveError: the disk refuses.
    """
    with save_errors(final):
        fsync_tree(folder)
        check_absent(final)
        folder.rename(final)
        sync(final.parent)
