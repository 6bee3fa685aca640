"""What takes long to make and can be made again, kept on disk under a key that names all that went into it.

    ~/.cache/qlora/data/<key>/    tokenised data         QLORA_CACHE names another folder, or is `off`
    ~/.cache/qlora/base/<key>/    quantized bases        QLORA_CACHE_GIB is the most that is kept (20)

A key is a SHA-256 over the content, the settings, and the code that does the work: what has changed is not found.
An entry is written beside its place and renamed once it is whole; its checksums are verified whenever it is
used. A damaged one is made again. Nothing that goes wrong with the cache ends a run.

One process writes at a time, and one that finds another writing does without. Readers take no lock: an entry
that vanishes under them is one that they do not find. Above the limit, those unused for longest are removed.
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
"""left free on the disk, for what a run has to save"""

_KEY = re.compile(r"[0-9a-f]{64}")

_warn = logging.getLogger("qlora").warning
Value = TypeVar("Value")


def folder() -> Path | None:
    """Where the cache lies; None where it is off or there is no home to put it in."""
    chosen = os.environ.get("QLORA_CACHE")
    if chosen == "off":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora"
    except RuntimeError:  # no home
        return None


def limit_bytes() -> int:
    """The most that the cache may hold. Raises UsageError if QLORA_CACHE_GIB is no number."""
    text = os.environ.get("QLORA_CACHE_GIB") or "20"
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        raise UsageError(f"QLORA_CACHE_GIB: {text!r} is no number of GiB")
    return int(float(text) * GIB)


def digest(**parts: Any) -> str:
    """SHA-256 of plain values: the key of what is made from them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def made_by(*code: str, libraries: tuple[str, ...]) -> dict[str, str]:
    """The part of a key that names who does the work: our own source (files or folders of the package), libraries.

    Whoever changes the code thus changes the key, and nobody has to remember a version.
    """
    sources = hashlib.sha256()
    for name in code:
        place = PACKAGE / name
        assert place.exists(), f"{place}: the code that a key should name has moved"
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
    worth_bytes: int = 0,
) -> Value:
    """The value of `key`: loaded if it is kept and whole, else made, and kept.

    Args:
        kind: of KINDS.
        key: gives the `digest` of all that decides the value, or None where nothing names it: then nothing is
            kept. It is asked again after `make`: what changed under its hands is not kept either.
        make: the slow way. What it raises is raised.
        save: writes a value into an empty folder.
        load: what `save` wrote. An OSError, ValueError, KeyError or SafetensorError sends it the slow way.
        size: bytes that `save` will write, near enough.
        about: names the value for people.
        worth_bytes: what is smaller is made about as fast as it is found, and not kept.
    """
    root = folder()
    wanted = None if root is None else key()
    if root is None or wanted is None:
        return make()
    entry = root / kind / wanted
    try:
        if _whole(entry):
            value = load(entry)
            with suppress(OSError):
                os.utime(entry)  # used now
            return value
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        _warn(f"cache: {entry} cannot be used ({error}); making it again")
    value = make()
    try:
        needed = size(value)
        if needed >= worth_bytes and key() == wanted:
            _keep(root, entry, needed, about, lambda place: save(value, place))
    except Exception as error:  # noqa: BLE001 - whatever it is, the value is there and the run can go on
        _warn(f"cache: {about} is not kept, so the next start takes as long: {error}")
    return value


@dataclass(frozen=True)
class Entry:
    """Something kept."""

    path: Path
    kind: str
    about: str
    bytes: int
    used: float
    """when it was used last, in seconds since 1970"""


def entries() -> list[Entry]:
    """All that is kept, the longest unused first."""
    root = folder()
    found = [] if root is None else [e for kind in KINDS for e in _entries_of(root / kind)]
    return sorted(found, key=lambda entry: entry.used)


def clear(*kinds: str) -> list[Entry]:
    """Remove all entries of these kinds, and return them. Waits for a process that is writing.

    Raises:
        SaveError: one cannot be removed.
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
    """Whether the entry is there. ValueError says why it cannot be used."""
    if not entry.is_dir():
        return False
    found = manifest.problems(entry, manifest.read(entry))
    if found:
        raise ValueError("; ".join(found))
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
            folder.rename(entry)  # no fsync: what a power cut spoils, its checksums tell


def _kept_meanwhile(entry: Path) -> bool:
    """Whether another process was first. A damaged entry is removed."""
    try:
        return _whole(entry)
    except (OSError, ValueError):
        discard(entry)
        return False


def _make_room(root: Path, needed: int) -> None:
    """Remove what was unused for longest until `needed` bytes fit; nothing if they never would."""
    kept = entries()
    used = sum(entry.bytes for entry in kept)
    free = shutil.disk_usage(root).free
    room = min(limit_bytes(), used + free - RESERVE_BYTES)
    if needed > room:
        raise ValueError(
            f"it takes {needed / GIB:.2f} GiB, {root} may hold {limit_bytes() / GIB:.2f} GiB (QLORA_CACHE_GIB), "
            f"and {free / GIB:.2f} GiB are free there"
        )
    for entry in kept:
        if used + needed <= room:
            break
        discard(entry.path)
        used -= entry.bytes


@contextmanager
def _alone(root: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the cache's lock. What a killed writer left is removed."""
    with lock(root, wait=wait):
        for kind in KINDS:
            remove_leftovers(root / kind, "*")
        yield
