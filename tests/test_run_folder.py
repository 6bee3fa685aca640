"""The contents of a run's folder: files that resuming repairs, and errors that name the file."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError, QloraError, RecipeError, SaveError
from qlora.recipe import Recipe
from qlora.storage import atomic, folders
from qlora.storage.json_files import without_checksum
from qlora.training import checkpoint
from qlora.training.result import TrainResult
from qlora.training.run_folder import CONTENTS, RESULTS, claim, earlier_plan, finished

SETTINGS: dict[str, Any] = {"base": {"model": "bundled/base"}, "data": {"source": "rows.jsonl"}}
PLAN = {"micro_batch_size": 2, "activation_checkpointing": "none"}
SUMMARY: dict[str, Any] = {
    "run": "runs/a", "result": "runs/a/adapter", "steps": 4, "total_steps": 4, "loss_before": 2.0, "loss_after": None,
    "memory": {"resident_bytes": 1, "allocated_bytes": None, "reserved_bytes": None},
    "seconds": 1.5, "stopped_by": None,
}  # fmt: skip


def recipe(**training: Any) -> Recipe:
    return Recipe.from_dict({**SETTINGS, "training": {"memory": "24GiB", **training}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run within a memory budget, with one checkpoint."""
    claimed = claim(recipe(), tmp_path / "run", resume=False, fresh=False, plan=PLAN)
    planned = Recipe.from_dict({**SETTINGS, "training": PLAN})
    with checkpoint.writing(claimed.path, 2, claimed.run_id) as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "recipe.yaml").write_text(planned.to_yaml())
        checkpoint.write_state(folder, {"step": 2, "plan": PLAN})
    return claimed.path


def identity(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["run_id"])


def resumed(run: Path, **training: Any) -> str:
    """Resume the run and return its id."""
    assert earlier_plan(run) == PLAN
    return claim(recipe(**training), run, resume=True, fresh=False, plan=PLAN).run_id


# Files are written only when they change


def test_resuming_rewrites_nothing_that_is_unchanged(run: Path) -> None:
    def written() -> dict[str, tuple[int, int]]:
        stats = {name: (run / name).stat() for name in ("run.json", "recipe.yaml")}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    before = written()
    resumed(run)
    assert written() == before
    resumed(run, max_steps=7)  # max_steps can change
    assert written()["run.json"] == before["run.json"]
    assert written()["recipe.yaml"] != before["recipe.yaml"]
    assert Recipe.recorded(run / "recipe.yaml").training.max_steps == 7


def test_a_file_and_then_its_folder_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        done.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    atomic.write(tmp_path / "file", b"content")
    assert done == ["sync .tmp-file", "replace file", f"sync {tmp_path.name}"]
    done.clear()
    claim(recipe(), tmp_path / "new", resume=False, fresh=False)
    assert done[0] == f"sync {tmp_path.name}"
    assert [line for line in done if "replace" in line] == [
        "replace run.json",
        "replace recipe.yaml",
        "replace run.json",
    ]


def test_a_symbolic_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".tmp-file").symlink_to(tmp_path / "thesis.txt")
    (tmp_path / "file").symlink_to(tmp_path / "thesis.txt")
    atomic.write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# Lost files are restored


@pytest.mark.parametrize("content", [None, b"", b"base: [", b"\xff\xfe", b"data: {}\n"])
def test_a_lost_recipe_is_taken_from_the_newest_checkpoint(
    run: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = identity(run)
    if content is None:
        (run / "recipe.yaml").unlink()
    else:
        (run / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"training\.seed: 0 then, 1 now"):
        claim(recipe(seed=1), run, resume=True, fresh=False)
    assert resumed(run) == before
    assert f"{run / 'recipe.yaml'} was missing or damaged" in caplog.text
    assert Recipe.recorded(run / "recipe.yaml").to_dict() == recipe().to_dict()


def test_a_lost_recipe_without_a_checkpoint_is_replaced(run: Path) -> None:
    before = identity(run)
    shutil.rmtree(run / "checkpoints")
    (run / "recipe.yaml").write_text("")
    assert resumed(run, seed=1) == before


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b'{"run_id": 3}', b"[" * 100_000])
def test_a_lost_identity_is_taken_from_the_checkpoints(
    run: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = identity(run)
    if content is None:
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_bytes(content)
    assert resumed(run) == before
    assert f"{run / 'run.json'} was missing or damaged" in caplog.text
    assert "manifest.json" in caplog.text
    assert without_checksum(json.loads((run / "run.json").read_text())) == {"run_id": before, "plan": PLAN}


def test_a_killed_fresh_start_of_an_earlier_version_is_recovered(run: Path) -> None:
    before = identity(run)
    (run / "run.json").unlink()
    (run / "recipe.yaml").unlink()
    (run / "notes.txt").write_text("the user's own")
    assert resumed(run) == before


# Errors that name the file


@pytest.mark.parametrize("content", [b"", b"{", b'{"run_id": null}'])
def test_an_identity_that_cannot_be_restored_is_refused(run: Path, content: bytes) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").write_bytes(content)
    for call in (lambda: earlier_plan(run), lambda: claim(recipe(), run, resume=True, fresh=False)):
        with pytest.raises(ModelError, match=r"run\.json: damaged .*--fresh"):
            call()
    assert claim(recipe(), run, resume=False, fresh=True).run_id == identity(run)


def test_resuming_does_not_remove_an_adapter_of_an_unknown_run(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").unlink()
    (run / "adapter").mkdir()
    with pytest.raises(ModelError, match=r"run\.json: missing.*--fresh"):
        claim(recipe(), run, resume=True, fresh=False)
    assert (run / "adapter").is_dir()


def outcome(run: Path) -> TrainResult | None:
    summary = finished(run)
    return None if summary is None else TrainResult.from_json(summary, run / "result.json")


def test_a_result_counts_only_for_its_own_run(run: Path) -> None:
    claim(recipe(), run, resume=True, fresh=False, plan=PLAN).write_result(SUMMARY)
    found = outcome(run)
    assert found is not None
    assert found.as_json() == {
        **SUMMARY,
        **{"facts": None, "adapter": None, "metrics": None},
        "result_step": 4,
    }
    (run / "result.json").write_text(json.dumps(SUMMARY))  # as an earlier version wrote it
    assert outcome(run) == found
    (run / "result.json").write_text(json.dumps({**SUMMARY, "run_id": "another"}))
    assert outcome(run) is None
    (run / "result.json").write_text(json.dumps(SUMMARY))
    (run / "run.json").write_text('{"run_id": "a", "starting": true}')
    assert outcome(run) is None


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_damaged_file_is_an_error_that_names_it(run: Path, name: str) -> None:
    claim(recipe(), run, resume=True, fresh=False, plan=PLAN).write_result(SUMMARY)
    shutil.rmtree(run / "checkpoints")  # which could restore run.json
    good = (run / name).read_bytes()
    (run / "result.json").write_text(json.dumps(SUMMARY)) if name == "run.json" else None
    chance = random.Random(0)
    damaged = [good[:size] for size in range(0, len(good) - 2, 5)]
    for _ in range(200):
        bytes_ = bytearray(good)
        bytes_[chance.randrange(len(bytes_))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(bytes_))
    complaints = []
    for content in damaged:
        (run / name).write_bytes(content)
        try:
            found = outcome(run)
            earlier_plan(run)
        except QloraError as error:
            complaints.append(str(error))
        else:
            assert found is None or found.seconds > found.steps - 1e9, "numbers must have a numeric type"
    assert all(str(run / name) in text for text in complaints)
    assert len(complaints) > 100


# Other contents of the folder


@pytest.mark.parametrize(
    "name", [*sorted(set(CONTENTS) - set(RESULTS)), ".lock", ".tmp-recipe.yaml", ".trash-adapter"]
)
def test_a_folder_with_only_our_files_is_accepted(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.touch() if "." in name else path.mkdir()
    if name in CONTENTS:
        with pytest.raises(RecipeError, match=r"--resume.*--fresh"):
            claim(recipe(), path.parent, resume=False, fresh=False)
    run = claim(recipe(), path.parent, resume=False, fresh=name in CONTENTS)
    assert identity(run.path) == run.run_id
    assert {child.name for child in run.path.iterdir()} <= {"run.json", "recipe.yaml", ".lock"}


@pytest.mark.parametrize(
    "names", [["thesis.txt"], ["recipe.yaml", "thesis.txt"], ["model", "train.py"], ["model"]]
)
def test_a_folder_with_other_files_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("years of work")
    for flags in ({"resume": True, "fresh": False}, {"resume": False, "fresh": True}):
        with pytest.raises(RecipeError, match="not a run of qlora"):
            claim(recipe(), tmp_path, **flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    "file", ["checkpoints/epoch1.ckpt", "wandb/notes.txt", "model/weights.pt", ".tmp-mine/x", "adapter/a.bin"]
)
@pytest.mark.parametrize("beside", [None, "wandb/run-1/logs", "recipe.yaml"])
def test_another_folder_with_one_of_our_names_is_refused_and_unchanged(
    tmp_path: Path, file: str, beside: str | None
) -> None:
    for name in filter(None, (file, beside)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("years of work")
    for flags in ((False, False), (True, False), (False, True)):
        with pytest.raises(RecipeError, match="not a run of qlora"):
            claim(recipe(), tmp_path, resume=flags[0], fresh=flags[1])
    assert (tmp_path / file).read_text() == "years of work"


def test_other_files_in_a_runs_folder_stay(tmp_path: Path) -> None:
    run = claim(recipe(), tmp_path / "run", resume=False, fresh=False)
    kept = [run.path / name for name in (".tmp-merged/draft", ".trash-old/x", "notes.txt")]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    with folders.replacing(run.path, "adapter") as folder:
        (folder / "a").touch()
    for flags in ((True, False), (False, True)):
        claim(recipe(), run.path, resume=flags[0], fresh=flags[1])
    assert all(file.read_text() == "mine" for file in kept)


@pytest.mark.parametrize(
    "plan",
    [
        {"micro_batch_size": "4"},
        {"micro_batch_size": 0},
        {"nonsense": 1},
        [1],
        {"loss_chunk": -1},
        {"activation_checkpointing": "x"},
    ],
    ids=str,
)
def test_a_damaged_plan_is_taken_from_the_checkpoint(tmp_path: Path, plan: object) -> None:
    right = {
        "micro_batch_size": 2,
        "activation_checkpointing": {"full": 0, "mlp": 3},
        "activation_offloading": False,
    }
    run = claim(recipe(), tmp_path / "run", resume=False, fresh=False, plan=right)
    assert earlier_plan(run.path) == right
    (run.path / "run.json").write_text(json.dumps({"run_id": run.run_id, "plan": plan}))
    if plan != [1]:
        with checkpoint.writing(run.path, 1, run.run_id) as folder:
            checkpoint.write_state(folder, {"step": 1, "plan": right})
        assert earlier_plan(run.path) == right
    else:
        (run.path / "adapter").mkdir()
        with pytest.raises(ModelError, match=r"run\.json.*plan"):
            earlier_plan(run.path)


def test_a_folder_in_the_place_of_a_file_does_not_stop_a_fresh_start(tmp_path: Path) -> None:
    run = claim(recipe(), tmp_path / "run", resume=False, fresh=False)
    (run.path / "recipe.yaml").unlink()
    (run.path / "recipe.yaml").mkdir()
    with checkpoint.writing(run.path, 1, run.run_id):
        pass
    again = claim(recipe(), run.path, resume=False, fresh=True)
    assert identity(again.path) == again.run_id != run.run_id
    assert (again.path / "recipe.yaml").is_file()


def test_a_run_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="file"):
        claim(recipe(), tmp_path / "file" / "run", resume=False, fresh=False)
