"""Damage to a trained adapter: any changed file is found and named, however the adapter is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.adapter import load_adapter, save_adapter
from qlora.adapter.algebra.tensors import adapter_folder
from qlora.adapter.start import find_adapter
from qlora.errors import ModelError
from qlora.inference.load import load_trained
from qlora.model.load import load_base
from qlora.recipe import Recipe
from qlora.training.train import train

RecipeFile = Callable[..., Path]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Recipe:
    overrides = [
        f"output={tmp_path_factory.mktemp('runs')}/run", f"base.model={tiny_llama}", "base.compute_dtype=float32",
        "training.max_steps=1", "optimizer.warmup_steps=0", "data.limit=8", "data.held_out=2",
        "training.samples=0", "adapter.rank=2", "tracking.wandb.mode=disabled",
    ]  # fmt: skip
    made = Recipe.load("quickstart", overrides)
    train(made, terminal=False)
    return made


@pytest.fixture
def adapter(recipe: Recipe, tmp_path: Path) -> Path:
    return shutil.copytree(Path(recipe.output) / "adapter", tmp_path / "adapter")


def test_every_changed_file_is_named(adapter: Path) -> None:
    files = sorted(path for path in adapter.iterdir() if path.name != "manifest.json")
    assert {"adapter_model.safetensors", "adapter_config.json", "qlora.json", "recipe.yaml"} < {
        file.name for file in files
    }
    for file in files:
        whole = file.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            for load in (load_trained, find_adapter, adapter_folder):
                with pytest.raises(
                    ModelError, match=rf"changed since its training: file {file.name}: checksum"
                ):
                    load(adapter)
        file.unlink()
        with pytest.raises(ModelError, match=rf"file {file.name}: missing"):
            load_trained(adapter)
        file.write_bytes(whole)
    load_trained(adapter)


def test_python_s_loading_finds_it_too_and_a_saved_adapter_is_no_damage(
    recipe: Recipe, adapter: Path
) -> None:
    model = load_adapter(load_base(recipe.base), adapter)
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: checksum differs"):
        load_adapter(load_base(recipe.base), adapter)
    save_adapter(model, adapter)  # over the damaged one
    assert file.read_bytes() == whole
    load_adapter(load_base(recipe.base), adapter)


def test_a_file_that_was_changed_on_purpose_can_be_used(adapter: Path) -> None:
    (adapter / "recipe.yaml").write_text((adapter / "recipe.yaml").read_text() + "# mine\n")
    with pytest.raises(ModelError, match=f"if you changed it yourself, remove {adapter}/manifest.json"):
        load_trained(adapter)
    (adapter / "manifest.json").unlink()
    load_trained(adapter)
