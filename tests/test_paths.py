"""Paths that no system call takes, files of other users, and broken links: one line and an exit code, no traceback."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands_for_tests import Done, qlora

from qlora.errors import RecipeError, UsageError
from qlora.recipe import Recipe, loading
from qlora.training.run_folder import check_output

RecipeFile = Callable[..., Path]


def fails_with(monkeypatch: pytest.MonkeyPatch, error: OSError) -> Done:
    def fail(name: object) -> Path:
        raise error

    monkeypatch.setattr(loading, "locate", fail)
    return qlora("check", "recipe.yaml")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO])
def test_an_error_that_names_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    done = fails_with(monkeypatch, OSError(number, os.strerror(number), "some/file"))
    assert done.returncode == UsageError.exit_code
    assert done.stderr == f"qlora: some/file: {os.strerror(number)}\n"


def test_an_error_that_names_none_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        fails_with(monkeypatch, OSError(errno.EIO, "Input/output error"))


def test_names_that_are_too_long_and_loops_of_links(recipe_file: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("n" * 300, tmp_path / "loop/x"):
        for command in (
            ("report", path), ("check", path), ("data", recipe_file(), f"data.source={path}.jsonl"),
            ("train", recipe_file(), f"output={path}/x"), ("adapter", "inspect", path),
        ):  # fmt: skip
            done = qlora(*command)
            assert done.returncode in (2, 3, 4), (command, done.stderr)
            assert "qlora: " in done.stderr or "Usage" in done.stderr


@pytest.mark.parametrize("character", ["\udcff", "\x07"])
def test_a_character_that_yaml_forbids_is_named_in_an_override(character: str) -> None:
    done = qlora("check", "quickstart", f"output=a{character}")
    assert (done.returncode, f"the character U+{ord(character):04X} is not allowed" in done.stderr) == (
        2,
        True,
    )


@pytest.mark.parametrize("place", ["link", "link/run"])
@pytest.mark.parametrize("aim", ["nowhere", "link"])
def test_an_output_behind_a_broken_link_is_named(
    recipe_file: RecipeFile, tmp_path: Path, place: str, aim: str
) -> None:
    (tmp_path / "link").symlink_to(aim)
    recipe = Recipe.load(recipe_file())
    for resume in (False, True):
        with pytest.raises(
            RecipeError, match=rf"output: .*/link is a broken symbolic link to {aim}\. Remove"
        ):
            check_output(recipe, tmp_path / place, resume=resume, fresh=False)
    assert not (tmp_path / "nowhere").exists()
