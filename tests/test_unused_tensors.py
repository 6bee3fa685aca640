"""A tensor of a checkpoint that its model has no place for is named before the run, from the headers alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import architectures_for_tests as small
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.model.load import load_config
from qlora.model.unused_tensors import unused_notes, unused_tensors
from qlora.recipe import Base, Recipe
from qlora.storage.safetensors_files import find_checkpoint
from qlora.training.check import check

FILE = "model.safetensors"


def saved(folder: Path, architecture: str = "llama", **changes: Any) -> Base:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small.config(architecture, **changes), dtype=torch.float32)
    model.save_pretrained(folder)
    return Base(model=str(folder), quantization="none", compute_dtype="float32")


def added(base: Base, *names: str) -> None:
    file = Path(base.model) / FILE
    save_file(load_file(file) | {name: torch.zeros(4) for name in names}, file, {"format": "pt"})


def notes(base: Base) -> list[str]:
    return unused_notes(base, load_config(base))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_checkpoint_as_transformers_writes_it_is_used_in_full(architecture: str, tmp_path: Path) -> None:
    assert notes(saved(tmp_path, architecture)) == []  # ties, Conv1D and stacked experts among them


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    base = saved(tmp_path)
    added(base, *(f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(4)))
    (note,) = notes(base)
    assert note.startswith("base.model: 4 of the checkpoint's tensors are not used")
    assert "model.layers.0.self_attn.q_proj.bias" in note
    assert "and 1 more" in note


def test_layers_that_the_configuration_does_not_ask_for_are_named(tmp_path: Path) -> None:
    base = saved(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    names = unused_tensors(base, load_config(base))
    assert len(names) == 9
    assert all(name.startswith("model.layers.3.") for name in names)


def test_parts_for_images_are_one_remark(tmp_path: Path) -> None:
    base = saved(tmp_path)
    added(base, "vision_model.layers.0.weight", "multi_modal_projector.weight", "model.visual.norm")
    (note,) = notes(base)
    assert "3 of the checkpoint's tensors are not used, those for images or sound" in note


def test_statistics_of_nf4_weights_are_no_unused_tensors(tmp_path: Path) -> None:
    base = saved(tmp_path)
    weight = "model.layers.0.mlp.up_proj.weight"
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    added(base, *(f"{weight}.{part}" for part in parts))
    assert notes(base) == []


def test_a_base_that_cannot_be_read_or_has_no_files_has_no_remarks(tmp_path: Path) -> None:
    base = saved(tmp_path)
    config = load_config(base)
    assert unused_notes(base.model_copy(update={"init": "synthetic"}), config) == []
    (tmp_path / FILE).write_bytes(b"no tensors")
    assert unused_notes(base, config) == []
    (tmp_path / FILE).unlink()
    assert unused_notes(base, config) == []


def test_check_names_unused_tensors(tmp_path: Path) -> None:
    recipe = Recipe.load("quickstart")
    shutil.copytree(find_checkpoint(recipe.base.model), tmp_path / "base")
    base = recipe.base.model_copy(update={"model": str(tmp_path / "base")})
    added(base, "model.odd.weight")
    data = recipe.data.model_copy(update={"limit": 400, "held_out": 4})
    found = check(recipe.model_copy(update={"base": base, "data": data, "output": str(tmp_path / "run")}))
    assert any("model.odd.weight" in note for note in found.notes)
