"""Disk cache of slow results, each under a key of everything that decides it.

    ~/.cache/qlora/data/<key>/    tokenised data           QLORA_CACHE: another folder, or `off`
    ~/.cache/qlora/base/<key>/    quantized base models    QLORA_CACHE_GIB: maximum size (20)

A key is a SHA-256 over the content, the settings, and the code that does the work, so a change makes a new key.
An entry is written to a temporary folder and renamed when it is complete. Its checksums are verified at every use,
and a damaged entry is made again. An error of the cache never ends a run.

One process writes at a time; a process that meets another writer does not cache its result. Readers take no lock: an
entry that is removed while they read it is a cache miss. Above the maximum size, the least recently used entries are
removed.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from qlora.errors import SaveError, UsageError
from qlora.storage import manifest
from qlora.storage.folders import InUseError, discard, lock, remove_leftovers, temporary

KINDS = ("data", "base")
GIB = 2**30
PACKAGE = Path(__file__).parents[1]
RESERVE_BYTES = GIB
"""free disk space that the cache leaves for a run's own files"""

_KEY = re.compile(r"[0-9a-f]{64}")

_warn = logging.getLogger("qlora").warning
Value = TypeVar("Value")


def folder() -> Path | None:
    """Return the cache folder; None if the cache is off or there is no home folder."""
    chosen = os.environ.get("QLORA_CACHE")
    if chosen == "off":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora"
    except RuntimeError:  # no home folder
        return None


def limit_bytes() -> int:
    """Return the maximum size of the cache.

    Raises:
        UsageError: QLORA_CACHE_GIB is not a number.
    """
    text = os.environ.get("QLORA_CACHE_GIB") or "20"
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        raise UsageError(f"QLORA_CACHE_GIB: {text!r} is not a number of GiB; set it to one, such as 20")
    return int(float(text) * GIB)


def digest(**parts: Any) -> str:
    """Return the key of a result: the SHA-256 of the plain values that decide it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def code_version(*code: str, libraries: tuple[str, ...]) -> dict[str, str]:
    """Return the part of a key that identifies the code: a hash of our source, and the versions of libraries.

    A change of the code thus changes the key, without a version number to maintain.

    Args:
        code: files or folders of the package.
        libraries: names of distributions.
    """
    sources = hashlib.sha256()
    for name in code:
        place = PACKAGE / name
        assert place.exists(), f"{place}: code of a cache key has moved"
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                sources.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return {"code": sources.hexdigest(), **{library: version(library) for library in libraries}}


def cached(
    kind: str,
    key: Callable[[], str | None],
    *,
    make: Callable[[], Value],
    save: Callable[[Value, Path], object],
    load: Callable[[Path], Value],
    size: Callable[[Value], int],
    about: str,
    min_bytes: int = 0,
) -> Value:
    """Return a value from the cache, or else make it and cache it.

    Args:
        kind: one of `KINDS`.
        key: returns the `digest` of all that decides the value, or None if the value must not be cached. It is called
            again after `make`: if the key has changed by then, the value is not cached.
        make: makes the value. Its errors are raised.
        save: writes a value into an empty folder.
        load: reads what `save` wrote. After an OSError, ValueError, KeyError or SafetensorError the value is made
            again.
        size: returns the approximate number of bytes that `save` writes.
        about: description of the value for messages.
        min_bytes: minimum size to cache; smaller values are made about as fast as they are loaded.
    """
    root = folder()
    wanted = None if root is None else key()
    if root is None or wanted is None:
        return make()
    entry = root / kind / wanted
    if (found := _loaded(entry, load)) is not None:
        return found
    value = make()
    try:
        needed = size(value)
        if needed >= min_bytes and key() == wanted:
            _keep(root, entry, needed, about, lambda place: save(value, place))
    except Exception as error:  # noqa: BLE001 - the value is made, so the run can continue
        _warn(f"cache: {about} is not cached, so the next start takes as long: {error}")
    return value


def found(kind: str, key: Callable[[], str | None], load: Callable[[Path], Value]) -> Value | None:
    """Return a value from the cache; None if it is not there. Arguments as in `cached`."""
    root = folder()
    wanted = None if root is None else key()
    return None if root is None or wanted is None else _loaded(root / kind / wanted, load)


def _loaded(entry: Path, load: Callable[[Path], Value]) -> Value | None:
    """Return the value of an entry; None if it is missing, or damaged, which is reported."""
    try:
        if _whole(entry):
            value = load(entry)
            with suppress(OSError):
                os.utime(entry)  # its time of last use
            return value
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        _warn(f"cache: {entry} cannot be used ({error}); it is made again")
    return None


@dataclass(frozen=True)
class Entry:
    """One entry of the cache."""

    path: Path
    kind: str
    about: str
    bytes: int
    used: float
    """time of last use, in seconds since 1970"""


def entries() -> list[Entry]:
    """Return all entries of the cache, least recently used first."""
    root = folder()
    all_entries = [] if root is None else [e for kind in KINDS for e in _entries_of(root / kind)]
    return sorted(all_entries, key=lambda entry: entry.used)


def clear(*kinds: str) -> list[Entry]:
    """Remove all entries of these kinds, and return them; wait for a process that is writing to the cache.

    Raises:
        SaveError: an entry cannot be removed.
    """
    root = folder()
    if root is None or not root.is_dir():
        return []
    try:
        with _alone(root, wait=True):
            gone = [entry for entry in entries() if entry.kind in kinds]
            for entry in gone:
                discard(entry.path)
    except OSError as error:
        raise SaveError(f"cannot clear {error.filename or root}: {error.strerror}") from error
    return gone


def _entries_of(place: Path) -> Iterator[Entry]:
    for path in place.glob("*"):
        if _KEY.fullmatch(path.name):
            with suppress(OSError):  # another process may be removing it
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                yield Entry(path, place.name, _about(path), size, path.stat().st_mtime)


def _about(entry: Path) -> str:
    try:
        return str(manifest.read(entry)["about"])
    except (OSError, ValueError, KeyError):
        return "damaged"


def _whole(entry: Path) -> bool:
    """Return True if the entry exists and is undamaged, False if it is missing; raise ValueError if it is damaged."""
    if not entry.is_dir():
        return False
    problems = manifest.problems(entry, manifest.read(entry))
    if problems:
        raise ValueError("; ".join(problems))
    return True


def _keep(root: Path, entry: Path, needed: int, about: str, write: Callable[[Path], object]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with suppress(InUseError), _alone(root):
        if _kept_meanwhile(entry):
            return
        _make_room(root, needed)
        with temporary(entry.parent, entry.name) as folder:
            write(folder)
            manifest.write(folder, about=about)
            folder.rename(entry)  # no fsync: checksums detect damage from a power cut


def _kept_meanwhile(entry: Path) -> bool:
    """Return True if another process has cached the entry by now; remove a damaged entry."""
    try:
        return _whole(entry)
    except (OSError, ValueError):
        discard(entry)
        return False


def _make_room(root: Path, needed: int) -> None:
    """Remove the least recently used entries until `needed` bytes fit; raise ValueError if they cannot fit."""
    kept = entries()
    used = sum(entry.bytes for entry in kept)
    free = shutil.disk_usage(root).free
    room = min(limit_bytes(), used + free - RESERVE_BYTES)
    if needed > room:
        raise ValueError(
            f"it takes {needed / GIB:.2f} GiB, the limit of {root} is {limit_bytes() / GIB:.2f} GiB (QLORA_CACHE_GIB), "
            f"and {free / GIB:.2f} GiB are free there"
        )
    for entry in kept:
        if used + needed <= room:
            break
        discard(entry.path)
        used -= entry.bytes


@contextmanager
def _alone(root: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the cache; remove leftovers of killed writers first."""
    with lock(root, wait=wait):
        for kind in KINDS:
            remove_leftovers(root / kind, "*")
        yield
