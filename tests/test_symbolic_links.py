"""Symbolic links that someone planted in a run's folder: nothing is written through them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import RecipeError, SaveError
from qlora.recipe import Recipe
from qlora.storage import folders
from qlora.tracking.record import Record
from qlora.training import checkpoint
from qlora.training.run_folder import CONTENTS, check_output
from qlora.training.train import train

RecipeFile = Callable[..., Path]


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    return file


@pytest.mark.parametrize("name", [*CONTENTS, ".lock", ".tmp-metrics.jsonl", ".trash-adapter"])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_run_s_folder_with_a_planted_link_is_refused(
    recipe_file: RecipeFile, tmp_path: Path, thesis: Path, name: str, kind: str
) -> None:
    recipe = Recipe.load(recipe_file())
    run = Path(recipe.output)
    run.mkdir()
    (run / "run.json").write_text('{"run_id": "1"}')
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / name).unlink(missing_ok=True)
    aim = {"file": thesis, "folder": tmp_path, "nothing": tmp_path / "nothing"}[kind]
    (run / name).symlink_to(aim, target_is_directory=kind == "folder")
    before = sorted(tmp_path.rglob("*"))
    for fresh in (False, True):
        with pytest.raises((RecipeError, SaveError), match="symbolic link"):
            train(recipe, resume=not fresh, fresh=fresh, terminal=False)
    assert thesis.read_text() == "years of work"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_lock_empties_no_other_file(tmp_path: Path, thesis: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(thesis)
    with pytest.raises(SaveError, match=r"\.lock"), folders.lock(tmp_path / "run"):
        pass
    assert thesis.read_text() == "years of work"


def test_links_that_appear_during_a_run_are_not_followed(tmp_path: Path, thesis: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="checkpoints"), checkpoint.writing(tmp_path, 1, "id") as folder:
        (folder / "file").write_text("text")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "metrics.jsonl").symlink_to(thesis)
    record = Record(tmp_path / "metrics.jsonl")  # takes the place of the link
    record.step({"step": 1, "loss": 1.0})
    record.finish({})
    assert thesis.read_text() == "years of work"


def test_the_folder_itself_can_be_a_link(recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file())
    (tmp_path / "other-disk").mkdir()
    Path(recipe.output).symlink_to(tmp_path / "other-disk")
    check_output(recipe, Path(recipe.output), resume=False, fresh=False)
    with folders.lock(Path(recipe.output)):
        assert (tmp_path / "other-disk/.lock").is_file()
