"""manifest.json: the files of a folder with their sizes and SHA-256, and its own. So a folder proves that it is whole.

safetensors has no checksum: without this a changed bit would load in silence.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
"""version of the manifest's layout"""


def write(folder: Path, **about: Any) -> None:
    """Describe every file under `folder`, and the description itself, so that no bit can change unnoticed.

    `about` are plain values that `read` gives back beside `files`.
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
    """The manifest of `folder`. OSError when it cannot be read, ValueError when it is not exactly as written."""
    text = (folder / MANIFEST).read_bytes().decode()
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _own_checksum(manifest):
        raise ValueError("checksum differs")
    if text != _dump(manifest):
        raise ValueError("bytes differ")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')}, this version of qlora reads {FORMAT}")
    return manifest


def problems(folder: Path, manifest: Mapping[str, Any], *, checksums: bool = True) -> list[str]:
    """How the files of `folder` differ from its manifest; an empty list when they do not.

    `checksums=False` compares sizes only, which finds everything but changed bytes without reading the files.
    Files the manifest does not name are no problem: nothing reads them.
    """

    def of(entry: tuple[str, Mapping[str, Any]]) -> list[str]:
        name, expected = entry
        try:
            found = (folder / name).stat().st_size
            if found != expected["bytes"]:
                return [f"file {name}: expected {expected['bytes']} bytes, found {found}"]
            if checksums and _sha256(folder / name) != expected["sha256"]:
                return [f"file {name}: checksum differs"]
        except FileNotFoundError:
            return [f"file {name}: missing"]
        except OSError as error:
            return [f"file {name}: {error.strerror}"]
        return []

    return [*chain.from_iterable(_in_threads(of, [*manifest["files"].items()]))]


def _in_threads(function: Any, items: list[Any]) -> list[Any]:
    """`function` of each item. Hashing frees the interpreter, so several files take the time of one."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(_dump(rest).encode()).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
