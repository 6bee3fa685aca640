"""The cache between starts: entries are reused, bounded and verified, and its errors never stop a run."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora.cli import app
from qlora.errors import UsageError
from qlora.storage import cache
from qlora.storage.folders import lock

KEYS = [f"{number:064x}" for number in range(8)]


class Maker:
    """Makes b"0", b"1", ... and counts its calls."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, key: str | None = KEYS[0], **arguments: Any) -> bytes:
        settings: dict[str, Any] = {
            "make": self.make,
            "save": lambda value, folder: (folder / "value").write_bytes(value),
            "load": lambda folder: (folder / "value").read_bytes(),
            "size": len,
            "about": f"number {key}",
        }
        return cache.cached("data", lambda: key, **{**settings, **arguments})

    def make(self) -> bytes:
        self.made += 1
        return str(self.made - 1).encode()


@pytest.fixture
def get() -> Maker:
    return Maker()


def kept() -> list[str]:
    return [entry.path.name for entry in cache.entries()]


def test_a_value_is_made_once_for_each_key(get: Maker) -> None:
    assert [get(KEYS[0]), get(KEYS[0]), get(KEYS[1]), get(KEYS[0]), get(KEYS[1])] == [
        b"0", b"0", b"1", b"0", b"1"
    ]  # fmt: skip


def test_small_or_keyless_values_are_not_kept(get: Maker) -> None:
    assert [get(None), get(None)] == [b"0", b"1"]
    assert [get(min_bytes=2), get(min_bytes=2)] == [b"2", b"3"]
    assert kept() == []
    assert [get(min_bytes=1), get(min_bytes=1)] == [b"4", b"4"]


def test_it_can_be_turned_off(get: Maker, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", "off")
    monkeypatch.chdir(cache_folder)
    assert [get(), get()] == [b"0", b"1"]
    assert list(cache_folder.rglob("*")) == []
    assert (cache.folder(), cache.entries(), cache.clear("data")) == (None, [], [])


def test_it_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache.folder() == tmp_path / "elsewhere" / "qlora"
    monkeypatch.setenv("QLORA_CACHE", "~/mine")
    assert cache.folder() == tmp_path / "mine"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "not JSON": lambda file: file.write_bytes(b"\xff{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["value", "manifest.json"])
def test_a_damaged_entry_is_made_again(
    get: Maker, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    get()
    (entry,) = cache.entries()
    DAMAGE[damage](entry.path / name)
    assert get() == b"1", "damaged content was used"
    assert "cannot be used" in caplog.text
    caplog.clear()
    assert get() == b"1", "the damaged entry was not replaced"
    assert caplog.text == ""
    assert get.made == 2


def test_an_entry_of_another_layout_is_made_again(get: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("qlora.storage.manifest.FORMAT", 0)
        get()
    assert [get(), get()] == [b"1", b"1"]


def test_an_unreadable_entry_is_made_again_but_other_errors_are_raised(
    get: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    get()

    def unreadable(folder: Path) -> bytes:
        raise KeyError("length")

    assert get(load=unreadable) == b"1"
    assert "cannot be used ('length')" in caplog.text
    with pytest.raises(ZeroDivisionError):
        get(load=lambda folder: 1 / 0)


def test_a_value_whose_key_changes_during_the_work_is_not_kept(get: Maker) -> None:
    answers = iter(KEYS)
    assert (
        cache.cached(
            "data", lambda: next(answers), make=get.make, save=lambda *_: None, load=len, size=len, about="-"
        )
        == b"0"
    )
    assert kept() == []


def test_a_key_that_fails_after_the_work_is_noted(get: Maker, caplog: pytest.LogCaptureFixture) -> None:
    def key() -> str:
        if get.made:
            raise PermissionError("no longer yours")
        return KEYS[0]

    made = cache.cached("data", key, make=get.make, save=lambda *_: None, load=len, size=len, about="-")
    assert made == b"0"
    assert "no longer yours" in caplog.text


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("shared")])
def test_an_entry_that_cannot_be_written_is_noted_and_leaves_nothing(
    get: Maker, cache_folder: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def save(value: bytes, folder: Path) -> None:
        (folder / "value").write_bytes(value)
        raise error

    assert get(save=save) == b"0"
    assert str(error) in caplog.text
    assert "is not cached" in caplog.text
    assert [file for file in cache_folder.rglob("*") if file.name not in ("data", ".lock")] == []
    assert [get(), get()] == [b"1", b"1"]


def test_a_cache_that_cannot_be_made_is_noted(
    get: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    assert [get(), get()] == [b"0", b"1"]
    assert "Not a directory" in caplog.text or "File exists" in caplog.text


def fill(get: Maker, count: int) -> None:
    """Fill the cache with entries of about 1 KiB; the first was unused for the longest time."""
    for number in range(count):
        get(KEYS[number], make=lambda: bytes(1024))
        os.utime(cache.folder() / "data" / KEYS[number], (number, number))  # type: ignore[operator]


def test_above_the_limit_the_least_recently_used_are_removed(
    get: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(get, 4)
    get(KEYS[0])  # now the most recently used
    used = sum(entry.bytes for entry in cache.entries())
    monkeypatch.setattr(cache, "limit_bytes", lambda: used)
    get(KEYS[5], make=lambda: bytes(1500))
    assert kept() == [KEYS[3], KEYS[0], KEYS[5]]
    assert sum(entry.bytes for entry in cache.entries()) <= used


def test_an_entry_above_the_limit_removes_nothing(
    get: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(get, 2)
    monkeypatch.setenv("QLORA_CACHE_GIB", "0.01")
    get(KEYS[5], make=lambda: bytes(20 * 2**20))
    assert kept() == KEYS[:2]
    assert "it takes 0.02 GiB" in caplog.text
    assert "is 0.01 GiB (QLORA_CACHE_GIB)" in caplog.text


def test_a_full_disk_is_noted_and_some_space_stays_free(
    get: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    fill(get, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, cache.RESERVE_BYTES + 100))
    get(KEYS[5], make=lambda: bytes(1024))
    assert kept() == [KEYS[1], KEYS[5]], "the oldest entry is removed"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    assert get(KEYS[6]) == b"0"
    assert "and 0.00 GiB are free there" in caplog.text
    assert kept() == [KEYS[1], KEYS[5]]


def test_a_limit_that_is_not_a_number(
    get: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QLORA_CACHE_GIB", "many")
    assert get() == b"0"
    assert "'many' is not a number of GiB" in caplog.text
    with pytest.raises(UsageError, match="'many' is not a number of GiB"):
        cache.limit_bytes()
    monkeypatch.setenv("QLORA_CACHE_GIB", "1.5")
    assert cache.limit_bytes() == 3 * 2**29


def test_a_process_does_not_wait_for_another_writer(get: Maker, caplog: pytest.LogCaptureFixture) -> None:
    def save(value: bytes, folder: Path) -> None:
        assert get(KEYS[1]) == b"1"  # flock treats two open files of one process like those of two processes
        (folder / "value").write_bytes(value)

    assert get(KEYS[0], save=save) == b"0"
    assert kept() == [KEYS[0]]
    assert caplog.text == ""


def test_clearing_waits_for_the_writer(get: Maker, cache_folder: Path) -> None:
    get()
    clearing = Thread(target=cache.clear, args=("data",))
    with lock(cache_folder):
        clearing.start()
        clearing.join(0.1)
        assert clearing.is_alive()
        assert kept() == [KEYS[0]]
    clearing.join()
    assert kept() == []


def test_the_first_of_two_writers_wins(get: Maker) -> None:
    def make() -> bytes:
        get()  # stands for a second process that finishes first
        return b"second"

    assert get(make=make) == b"second"
    assert get() == b"0"


WRITER = """
import sys, time
from pathlib import Path
from qlora.storage import cache
def save(value, folder):
    (folder / "value").write_bytes(value)
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
load = lambda folder: (folder / "value").read_bytes()
cache.cached("data", lambda: sys.argv[1], make=lambda: b"theirs", save=save, load=load, size=len, about="-")
"""


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(
    get: Maker, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", WRITER, KEYS[0], "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        assert get(KEYS[1]) == b"0"
        assert kept() == [], "two processes wrote at once"
        writer.kill()
    assert list((cache_folder / "data").glob(".tmp-*"))
    assert [get(KEYS[0]), get(KEYS[0])] == [b"1", b"1"]
    assert not list((cache_folder / "data").glob(".tmp-*"))
    assert caplog.text == ""


def test_processes_at_once_agree(cache_folder: Path, get: Maker) -> None:
    command = [sys.executable, "-c", WRITER, KEYS[0], "0.1"]
    writers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert get(KEYS[0]) == b"theirs"


def test_the_command_shows_and_clears(get: Maker, cache_folder: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["cache", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    fill(get, 2)
    (cache_folder / "data" / "notes.txt").write_text("mine")
    lines = run("show").splitlines()
    assert [line.rpartition("  ")[2] for line in lines[:2]] == [f"number {KEYS[1]}", f"number {KEYS[0]}"]
    assert lines[2] == f"{cache_folder}: 0.00 GiB of 20.00 GiB"
    assert [entry["kind"] for entry in json.loads(run("show", "--json"))["entries"]] == ["data", "data"]
    assert run("clear", "base") == "Removed 0 entries, 0.00 GiB\n"
    assert run("clear") == "Removed 2 entries, 0.00 GiB\n"
    assert kept() == []
    assert (cache_folder / "data" / "notes.txt").read_text() == "mine", "other files must stay"


def test_a_key_names_code_and_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.py").write_text("1")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)

    def key() -> str:
        return cache.digest(code_version=cache.code_version("data", libraries=("tokenizers",)))

    first = key()
    (tmp_path / "data" / "__pycache__").mkdir()
    (tmp_path / "data" / "__pycache__" / "a.pyc").write_text("compiled")
    assert key() == first
    (tmp_path / "data" / "a.py").write_text("2")
    changed = key()
    monkeypatch.setattr(cache, "version", lambda library: "0")
    assert len({first, changed, key()}) == 3
    with pytest.raises(AssertionError, match="gone"):
        cache.code_version("gone", libraries=())


def test_a_note_reaches_the_user_without_any_setup(tmp_path: Path) -> None:
    code = "from qlora.storage import cache; cache._warn('cache: a note')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr == "cache: a note\n"
    assert logging.getLogger("qlora").level == logging.NOTSET
