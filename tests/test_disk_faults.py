"""Disks that are full and files that cannot be removed, while a run saves."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import SaveError
from qlora.recipe import Recipe
from qlora.storage import folders, manifest
from qlora.training import checkpoint, disk_space
from qlora.training.train import train

RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe(recipe_file: RecipeFile) -> Recipe:
    return Recipe.load(recipe_file(training={"save_every": 1, "max_steps": 6, "keep_checkpoints": 2}))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.usefixtures("without_forecast")
def test_three_failed_checkpoints_in_a_row_end_the_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, fails = manifest.write, {1, 3, 4, 5}

    def full(folder: Path, **about: Any) -> None:
        if about.get("step") in fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, **about)

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(
        SaveError, match=r"3 checkpoints in a row .* ends at step 5: .*free.*step-000002 with --resume"
    ):
        train(recipe, terminal=False)
    assert caplog.text.count("not saved") == 3
    fails.clear()
    assert train(recipe, resume=True, terminal=False).steps == 6


@pytest.mark.usefixtures("without_forecast")
def test_what_cannot_be_removed_does_not_end_the_saving(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = shutil.rmtree

    def busy(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith(".trash-step-000001"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), ".nfs0001")
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", busy)
    outcome = train(recipe, terminal=False)
    assert outcome.result is not None
    assert names(outcome.run) == [".trash-step-000001", "step-000005", "step-000006"]
    assert caplog.text.count("could not be removed: Device or resource busy") == 1


@pytest.mark.usefixtures("without_forecast")
def test_a_saved_checkpoint_is_not_called_unsaved_when_an_older_one_stays(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(checkpoint, "discard", refused)
    outcome = train(recipe, terminal=False)
    assert "checkpoint of step 3 saved, but an older one is not removed: cannot write" in caplog.text
    assert "not saved" not in caplog.text
    assert names(outcome.run)[-1] == "step-000006"


def test_leftovers_that_stay_take_no_name_from_the_next_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    for name in (".trash-adapter", ".trash-adapter~2"):
        (tmp_path / name / "file").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", busy)
    for text in ("one", "two"):
        with folders.replacing(tmp_path, "adapter") as folder:
            (folder / "text").write_text(text)
        (tmp_path / ".tmp-adapter").mkdir(exist_ok=True)
        assert (tmp_path / "adapter/text").read_text() == text
    assert (tmp_path / ".trash-adapter~3/text").read_text() == "one"


def test_after_a_kill_between_two_renames_the_newest_folder_gets_the_name(tmp_path: Path) -> None:
    for name, text in ((".tmp-adapter", "partial"), (".tmp-adapter~2", "whole"), (".trash-adapter~3", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(text)
    folders.recover(tmp_path, "adapter")
    assert (tmp_path / "adapter/text").read_text() == "whole"


@pytest.mark.usefixtures("without_forecast")
@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_begins_only_if_a_checkpoint_and_the_result_fit(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh: bool
) -> None:
    free = 10**9
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: free)
    train(recipe, terminal=False)
    assert "do not fit" not in caplog.text
    run = Path(recipe.output)
    size = sum(file.stat().st_size for file in run.glob("checkpoints/step-000005/**/*.safetensors"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    if not fresh:
        recipe = recipe.model_copy(update={"output": f"{run}-2"})
    held = sum(map(len, before.values())) if fresh else 0
    free = size - held
    with pytest.raises(
        SaveError, match=r"a checkpoint takes .* MiB and the result .* MiB, but the disk of .* free"
    ):
        train(recipe, fresh=fresh, terminal=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    free = 2 * size - held
    train(recipe, fresh=fresh, terminal=False)
    assert "2 checkpoints of" in caplog.text


@pytest.mark.usefixtures("without_forecast")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "4 of 4 steps are missing, the first is step 1"),
        (lambda text: "".join(text.splitlines(keepends=True)[:3]), "steps are missing, the first is step 3"),
        (lambda text: text.replace('"step": 2, "loss"', '"step": 2, "lqss"'), "1 of 4 steps are missing"),
        (lambda text: text.replace('"lr": ', '"ls": ', 1), "lines were changed"),
        (lambda text: text, None),
    ],
    ids=["removed", "cut", "a step without its loss", "another key", "nothing"],
)
def test_damage_to_the_record_is_said_and_does_not_end_the_run(
    recipe_file: RecipeFile,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[str], str],
    said: str | None,
) -> None:
    recipe = Recipe.load(recipe_file(training={"save_every": 4, "max_steps": 6, "eval_every": 3}))
    done = train(recipe, terminal=False)
    (done.run / "result.json").unlink()  # as if it was killed after step 4
    shutil.rmtree(done.run / "checkpoints/step-000006")
    file = done.run / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(damage(whole))
    resumed = train(recipe, resume=True, terminal=False)
    assert resumed.loss_after == done.loss_after
    notes = [line for line in caplog.messages if "metrics.jsonl: damaged since" in line]
    assert len(notes) == (said is not None)
    if said is not None:
        assert said in notes[0]
    assert (done.run / "report.html").is_file()
