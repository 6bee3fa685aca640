"""A pipe, a device or a folder in the place of a file is an error, and no command waits for ever."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from checkpoints_for_tests import save
from commands_for_tests import qlora

from qlora.adapter.config import read_fields
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import stored_distances
from qlora.data import sources, templates
from qlora.data.files import READERS
from qlora.data.prompt_files import shared_system
from qlora.errors import DataError, ModelError, RecipeError
from qlora.model.base_files import damaged_weights
from qlora.recipe import Recipe
from qlora.storage import json_files, manifest, regular_file
from qlora.storage.safetensors_files import ShardReader
from qlora.tracking.record import Record
from qlora.training import checkpoint
from qlora.training.run_folder import earlier_run_id, recorded

RecipeFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_endless_wait() -> Iterator[None]:
    def waited(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits for a writer of the pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("a\r\n\xe9".encode())
    (tmp_path / "link").symlink_to(tmp_path / "text")
    assert regular_file.read_text(tmp_path / "link") == "a\r\n\xe9"
    (tmp_path / "pipe link").symlink_to(pipe(tmp_path / "pipe"))
    for name, reason in (
        ("pipe", "Not a regular file"), ("pipe link", "Not a regular file"), (os.devnull, "Not a regular file"),
        (".", "Is a directory"), ("missing", "No such file"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=reason) as caught:
            regular_file.check(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("suffix", READERS)
def test_a_pipe_named_like_a_data_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = pipe(tmp_path / f"rows{suffix}")
    for source in (str(path), str(tmp_path)):
        assert sources.identity(source) is None
        assert sources.count(source) is None
        with pytest.raises(DataError, match="is not a regular file"):
            list(sources.read(source))


@pytest.mark.parametrize("key", ["data.source", "data.held_out"])
def test_a_command_names_the_pipe(recipe_file: RecipeFile, tmp_path: Path, key: str) -> None:
    path = pipe(tmp_path / "pipe.jsonl")
    run = qlora("data", recipe_file(), f"{key}={path}")
    assert (run.returncode, f"{str(path)!r} is not a regular file" in run.stderr) == (
        DataError.exit_code,
        True,
    )


def index(path: Path) -> object:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    return ShardReader(path)


READS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "recipe": ("r.yaml", lambda folder: Recipe.load(folder / "r.yaml")),
    "recipe of a run": ("recipe.yaml", lambda folder: Recipe.recorded(folder / "recipe.yaml")),
    "template": ("t.jinja", lambda folder: templates.template_text(str(folder / "t.jinja"))),
    "system prompt": ("system_prompt.txt", shared_system),
    "identity of a base": ("qlora.json", BaseIdentity.read),
    "manifest": ("manifest.json", manifest.check_unchanged),
    "JSON": ("x.json", lambda folder: json_files.read_object(folder / "x.json")),
    "state": ("state.json", checkpoint.read_state),
    "optimizer": ("optimizer.safetensors", lambda folder: checkpoint.load_tensors(folder / "optimizer.safetensors")),
    "values at the start": ("qlora_init.safetensors", stored_distances),
    "record": ("metrics.jsonl", lambda folder: Record(folder / "metrics.jsonl", resume_step=1)),
    "shard": ("model-1.safetensors", index),
    "run": ("run.json", lambda folder: ((folder / "adapter").mkdir(), earlier_run_id(folder))),
    "adapter": ("adapter_config.json", lambda folder: read_fields(folder / "adapter_config.json")),
}  # fmt: skip


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("other", ["pipe", "folder"])
def test_no_file_of_others_is_waited_for(tmp_path: Path, kind: str, other: str) -> None:
    name, reads = READS[kind]
    if other == "folder":
        (tmp_path / name).mkdir()
    else:
        pipe(tmp_path / name)
    with pytest.raises((RecipeError, DataError, ModelError)) as caught:
        reads(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_pipes_are_named_among_the_weights_of_a_base(tmp_path: Path) -> None:
    pipe(tmp_path / "model.safetensors")
    assert "Not a regular file" in (damaged_weights(tmp_path) or "")


def test_a_checkpoint_with_a_pipe_is_damaged(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    pipe(folder / "manifest.json")
    assert checkpoint.verify(folder) == ["file manifest.json: Not a regular file"]
    shutil.rmtree(folder)
    folder = save(tmp_path, 1)
    pipe(folder / "weights.bin")
    assert "file weights.bin" in checkpoint.verify(folder)[0]


def test_a_manifest_that_is_a_folder_does_not_turn_the_check_off(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ModelError, match=r"changed since its training: file manifest\.json: Is a directory"):
        manifest.check_unchanged(tmp_path)


def test_a_run_s_recipe_that_is_a_pipe_counts_as_damaged(tmp_path: Path) -> None:
    assert recorded(pipe(tmp_path / "recipe.yaml")) is None
