"""manifest.json: sizes and SHA-256 checksums of a folder's files, and of itself, to detect missing or changed files.

safetensors files have no checksum: without a manifest, a changed bit would be loaded without an error.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.storage import regular_file

MANIFEST = "manifest.json"
FORMAT = 1
"""version of the manifest's layout"""


def write(folder: Path, **about: Any) -> None:
    """Write the manifest of all files under `folder`, with a checksum of the manifest itself.

    Args:
        folder: the folder to describe.
        about: plain values to store in the manifest next to `files`.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = _in_threads(_sha256, paths)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, sums, strict=True)
    }
    manifest = {**about, "format": FORMAT, "files": files}
    manifest["sha256"] = _own_checksum(manifest)
    (folder / MANIFEST).write_text(_dump(manifest))


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not exactly as it was written.
    """
    text = regular_file.read_text(folder / MANIFEST)
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _own_checksum(manifest):
        raise ValueError("checksum differs")
    if text != _dump(manifest):
        raise ValueError("bytes differ")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')}, but this version of qlora reads format {FORMAT}")
    return manifest


def problems(folder: Path, manifest: Mapping[str, Any], *, checksums: bool = True) -> list[str]:
    """Return the differences between the files of `folder` and its manifest; an empty list if there are none.

    Files that the manifest does not list are ignored: nothing reads them.

    Args:
        folder: the folder to check.
        manifest: its manifest, from `read`.
        checksums: False compares only sizes, without reading the files; changed bytes are then not detected.
    """

    def differences(entry: tuple[str, Mapping[str, Any]]) -> list[str]:
        name, expected = entry
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return [f"file {name}: expected {expected['bytes']} bytes, found {size}"]
            if checksums and _sha256(folder / name) != expected["sha256"]:
                return [f"file {name}: checksum differs"]
        except FileNotFoundError:
            return [f"file {name}: missing"]
        except OSError as error:
            return [f"file {name}: {error.strerror}"]
        return []

    return [*chain.from_iterable(_in_threads(differences, [*manifest["files"].items()]))]


def check_unchanged(folder: Path) -> None:
    """Check that the files of a trained result are those that its training wrote. Does nothing without a manifest.

    Raises:
        ModelError: a file is missing or has other content, or the manifest itself is damaged.
    """
    if not os.path.lexists(folder / MANIFEST):
        return  # an adapter of PEFT, or of an earlier version
    try:
        found = problems(folder, read(folder))
    except (OSError, ValueError) as error:
        found = [f"file {MANIFEST}: {getattr(error, 'strerror', None) or error}"]
    if found:
        raise ModelError(
            f"{folder}: damaged or changed since its training: {'; '.join(found)}. Restore it from a copy; if you "
            f"changed it yourself, remove {folder / MANIFEST}"
        )


def _in_threads(function: Any, items: list[Any]) -> list[Any]:
    """Call `function` on each item, in threads: hashing releases the GIL, so files are hashed in parallel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(_dump(rest).encode()).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _sha256(file: Path) -> str:
    with regular_file.opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
