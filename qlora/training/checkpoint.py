"""Atomic checkpoints, verified by their manifest when they are read.

    runs/<name>/checkpoints/step-000100/   any files, then manifest.json: run, step, sizes and SHA-256 of the files

A checkpoint is written under a `.tmp-` name next to its final place: files, manifest, fsync of all, rename, fsync of
the parent. The rename is the commit. A kill or a power cut leaves a folder without a matching manifest, which is never
loaded. safetensors has no checksum and does not fsync; the manifest and this order provide both. Nothing is pickled:
tensors are safetensors, everything else is JSON.

Only one process at a time writes a run's folder; `folders.lock` ensures that.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qlora.errors import ModelError
from qlora.storage import manifest, regular_file, tensor_file
from qlora.storage.atomic import sync
from qlora.storage.folders import commit, discard, fsync_tree, remove_leftovers, save_errors, temporary

if TYPE_CHECKING:
    from torch import Tensor

_warn = logging.getLogger("qlora").warning


@contextmanager
def writing(run: Path, step: int, run_id: str) -> Iterator[Path]:
    """Yield a new folder; commit what the body writes into it as the checkpoint of `step`.

        with writing(run, 100, run_id) as folder:
            save_tensors(folder / "optimizer.safetensors", optimizer.state())

    The body can make subfolders. If it raises, nothing remains. A whole checkpoint of the same step and run is kept; a
    damaged one is replaced.

    Raises:
        SaveError: a file cannot be written. The message gives the path and the system's reason.
    """
    checkpoints = run / "checkpoints"
    final = checkpoints / f"step-{step:06d}"
    with save_errors(checkpoints):
        if checkpoints.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(checkpoints))
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoints, "step-*")
        with temporary(checkpoints, final.name) as folder:
            yield folder
            manifest.write(folder, run_id=run_id, step=step)
            fsync_tree(folder)
            if not (final.exists() and not verify(final, run_id=run_id)):
                commit(folder, final)
        sync(run)  # `checkpoints` itself may be new


def newest(
    run: Path,
    *,
    run_id: str | None = None,
    checksums: bool = True,
    report: Callable[[str], object] = _warn,
) -> Path | None:
    """Return the newest checkpoint whose manifest matches its files, or None if there is no checkpoint.

    Args:
        run: the run's folder.
        run_id: if given, checkpoints of other runs count as damaged.
        checksums: see `verify`.
        report: called with one line for every newer checkpoint that is skipped.

    Raises:
        ModelError: all checkpoints are damaged. (A run must not silently start again from step 0.)
    """
    rejected: list[str] = []
    for folder in reversed(_folders(run)):
        problems = verify(folder, run_id=run_id, checksums=checksums)
        if not problems:
            for line in rejected:
                report(f"checkpoint skipped: {line}; resuming from {folder.name}")
            return folder
        rejected.append(f"{folder}: {'; '.join(problems)}")
    if rejected:
        raise ModelError(
            "every checkpoint of this run is damaged:\n  " + "\n  ".join(rejected) + "\n"
            "Restore one from a copy, or start again with --fresh"
        )
    return None


def verify(folder: Path, *, run_id: str | None = None, checksums: bool = True) -> list[str]:
    """Return the problems of a checkpoint; an empty list if it is exactly as written.

    `checksums=False` compares sizes only: it does not read the files, and finds every problem except changed bytes.
    Files that are not in the manifest are ignored, because nothing reads them.
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
    """Remove the oldest checkpoints of this run so that `keep` whole ones remain; return the removed folders.

    Call it only after a commit. Damaged checkpoints and those of other runs are neither removed nor counted.
    Files that cannot be deleted are reported and stay under a `.trash-` name.

    Raises:
        SaveError: a folder cannot be removed.
    """
    assert keep >= 1
    own = [folder for folder in _folders(run) if not verify(folder, run_id=run_id, checksums=False)]
    for folder in own[:-keep]:
        with save_errors(folder):
            discard(folder)
    return own[:-keep]


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write named tensors, on any device, to a safetensors file."""
    with save_errors(path):
        tensor_file.write(path, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read the named tensors of a safetensors file to the CPU.

    Raises:
        ModelError: the file is missing or is not a safetensors file.
    """
    from safetensors.torch import load_file

    try:
        regular_file.check(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Restore the file") from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write counters and other plain values to `<folder>/state.json`."""
    with save_errors(folder / "state.json"):
        (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """Read the values that `write_state` wrote.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        state = json.loads(regular_file.read_text(folder / "state.json"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'state.json'}: cannot be read: {error}. Restore the file") from error
    if not isinstance(state, dict):
        raise ModelError(f"{folder / 'state.json'}: not a JSON object. Restore the file")
    return state


def _folders(run: Path) -> list[Path]:
    """Return the committed checkpoints, whole or damaged, oldest first."""
    return sorted(
        (f for f in (run / "checkpoints").glob("step-*") if f.is_dir() and _step(f) >= 0), key=_step
    )


def _step(folder: Path) -> int:
    """Return the step in a checkpoint's name; -1 if the name is not a checkpoint's."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1
