"""Damaged folders of bases: a ModelError names the file, whatever transformers and tokenizers make of it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora import bundled
from qlora.errors import ModelError
from qlora.model.load import load_base, load_config, load_tokenizer
from qlora.recipe import Base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(bundled.path("bundled/base"), tmp_path / "base")


def load(folder: Path) -> None:
    base = Base(model=str(folder), compute_dtype="float32")
    config = load_config(base)
    load_tokenizer(base).encode("Do you repair lamps?")
    load_base(base, config=config)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def a_list(file: Path) -> None:
    file.write_text("[]")


def setting(*keys: str, value: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = place = json.loads(file.read_text())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        file.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((f"{name}.json", change) for name in ("config", "tokenizer", "tokenizer_config", "generation_config")
          for change in (cut, empty, a_list)),
        ("model.safetensors", cut), ("model.safetensors", empty),
        ("config.json", setting("attention_bias", value=-1)), ("config.json", setting("use_cache", value=1.5)),
        ("config.json", setting("hidden_size", value=0)), ("config.json", setting("model_type", value=3)),
        ("config.json", setting("hidden_size", value=128)), ("config.json", setting("num_hidden_layers", value=9)),
        ("tokenizer.json", setting("model", "ignore_merges", value=10**9)),
        ("tokenizer.json", setting("model", "merges", value=["a"])),
        ("tokenizer_config.json", setting("padding_side", value="x")),
        ("tokenizer_config.json", setting("model_max_length", value={})),
        ("generation_config.json", setting("pad_token_id", value={})),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(folder: Path, name: str, change: Callable[[Path], None]) -> None:
    load(folder)
    change(folder / name)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_the_tokenizer_cannot_read_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    with pytest.raises(ModelError, match=r"config\.json cannot be read") as caught:
        load_tokenizer(Base(model=str(folder)))
    assert "tokenizer_config.json" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load(folder)


def test_a_renamed_tensor_is_not_made_up(folder: Path) -> None:
    """transformers initialises a weight that it does not find at random, and logs it."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"model.layers.1.mlp.up_proj", b"model.layers.1.mlp.uq_proj"))
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_a_pickle_is_never_read(folder: Path, tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    torch.save(load_file(folder / "model.safetensors") | {"evil": Opened()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, .* Convert it"):
        load(folder)
    assert not (tmp_path / "opened").exists()


def test_a_header_that_promises_too_much_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(folder)
