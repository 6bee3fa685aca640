"""Adapter folders as plain tensors: read as strictly as into a model, written to a new folder whole or not at all."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import CONFIG, TENSORS, updates, write_adapter
from safetensors.torch import load_file, save_file

from qlora.adapter import LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.algebra.tensors import Layer, read, write
from qlora.errors import ModelError, SaveError, UsageError
from qlora.storage import tensor_file

LAYERS = {"blocks.0.up": (6, 4, 2), "blocks.0.down": (4, 6, 3), "blocks.1.up": (6, 4, 2)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {r"blocks\.1\.up": 3}},
        {"target_modules": r"blocks\.\d\.\w+"},
    ],
)
def test_reading_gives_what_was_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    before = write_adapter(tmp_path / "a", LAYERS, dtype=torch.bfloat16, **settings)
    (before / "recipe.yaml").write_text("base: {model: x}\n")
    adapter = read(before)
    assert write(adapter, tmp_path / "b" / "c") == (tmp_path / "b" / "c" / TENSORS).stat().st_size
    after = tmp_path / "b" / "c"
    assert {file.name for file in after.iterdir()} == {CONFIG, TENSORS, "recipe.yaml"}
    for name, update in updates(after).items():
        assert torch.equal(update, updates(before)[name])
        torch.testing.assert_close(adapter.layers[name].update.b @ adapter.layers[name].update.a, update)
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (after, before))
    assert {key: ours[key] for key in theirs.keys() - {"rank_pattern", "alpha_pattern"}} == {
        key: theirs[key] for key in theirs.keys() - {"rank_pattern", "alpha_pattern"}
    }
    assert (after / "recipe.yaml").read_text() == "base: {model: x}\n"


def test_adapter_folders_are_exchanged_with_a_model(tmp_path: Path) -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 4)})

    model = adapt(
        network(), LoraSpec(targets="all-linear", rank_pattern={"up": 3}, alpha_pattern={"down": 5})
    )
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_b)
    save_adapter(model, tmp_path / "run" / "adapter")
    adapter = read(tmp_path / "run")  # a run's folder is accepted too
    write(adapter, tmp_path / "copy")
    loaded = lora_layers(load_adapter(network(), tmp_path / "copy"))
    for name, layer in lora_layers(model).items():
        assert torch.equal(loaded[name].lora_a, layer.lora_a)
        assert torch.equal(loaded[name].lora_b, layer.lora_b)
        assert loaded[name].scaling == adapter.layers[name].scaling == layer.scaling


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def rewrite(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(folder / TENSORS) | {f"base_model.model.{name}.weight": tensor}, folder / TENSORS)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "there is no adapter"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "adapter_model.safetensors is missing"),
    "a pickle": (
        lambda f: (f / TENSORS).rename(f / "adapter_model.bin"),
        r"adapter_model.bin is a pickle.*weights_only=True",
    ),
    "empty": (lambda f: save_file({}, f / TENSORS), "holds no tensors"),
    "dora": (lambda f: edit(f, use_dora=True), "adapters of dora cannot be composed, compressed or exported"),
    "rank": (
        lambda f: edit(f, r=5),
        r"blocks.0.up.lora_A.weight is \[2, 4\], but the rank in adapter_config.json is 5",
    ),
    "one dimension": (
        lambda f: rewrite(f, "blocks.0.up.lora_B", torch.ones(2)),
        r"blocks.0.up.lora_B.weight is \[2\]",
    ),
    "targets": (
        lambda f: edit(f, target_modules=["up"]),
        r"matches no name of 1 layers with tensors \(blocks.0.down\)",
    ),
    "target kinds": (lambda f: edit(f, target_modules=[1]), "must be a string or a list of strings"),
    "target pattern": (lambda f: edit(f, target_modules="("), "is not a valid regular expression"),
    "recipe": (
        lambda f: (f / "recipe.yaml").write_bytes(b"\xff"),
        "recipe.yaml: cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    folder = write_adapter(tmp_path / "a", LAYERS)
    change, message = DAMAGED[damage]
    change(folder)
    with pytest.raises(ModelError, match=message) as error:
        read(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    adapter = read(write_adapter(tmp_path / "a", LAYERS))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("a", "file", "dangling"):
        with pytest.raises(UsageError, match=re.escape(f"{tmp_path / name}: already exists")):
            write(adapter, tmp_path / name)
    (tmp_path / "empty").mkdir()
    write(adapter, tmp_path / "empty")
    assert read(tmp_path / "empty").layers.keys() == adapter.layers.keys(), "an empty folder can be used"


def test_an_error_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read(write_adapter(tmp_path / "a", LAYERS))
    layer = adapter.layers["blocks.0.up"]
    large = replace(layer, b=(1e6 * layer.b).half())
    with pytest.raises(ModelError, match=r"blocks.0.up.lora_B.weight is not finite: nothing was saved"):
        write(replace(adapter, layers={**adapter.layers, "blocks.0.up": large}), tmp_path / "b")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match=r"cannot write .*No space left"):
        write(adapter, tmp_path / "b")
    monkeypatch.undo()

    def flip(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(tensor_file, "write", flip)
    with pytest.raises(SaveError, match="the numbers read back differ"):
        write(adapter, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_scalings_that_one_flag_cannot_express_are_refused(tmp_path: Path) -> None:
    adapter = read(write_adapter(tmp_path / "a", LAYERS))
    layer = adapter.layers["blocks.0.up"]
    odd = Layer(layer.a, layer.b, alpha=4, scaling=4 / 2**0.5)
    with pytest.raises(
        ModelError, match=r"blocks.0.up by alpha.sqrt\(rank\), but PEFT's config holds one scaling"
    ):
        write(replace(adapter, layers={**adapter.layers, "blocks.0.up": odd}), tmp_path / "b")
    assert not (tmp_path / "b").exists()
