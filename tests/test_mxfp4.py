"""Checkpoints of gpt-oss in MXFP4: dequantized projection by projection, then quantized to NF4."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import config
from runs_for_tests import finished_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from qlora import bundled
from qlora.adapter import load_adapter
from qlora.merging.merge import merge
from qlora.merging.write import MergeSource
from qlora.model.load import load_base, load_config
from qlora.model.precision import precision_of
from qlora.model.unused_tensors import unused_tensors
from qlora.quantization import nf4
from qlora.quantization.expert_stack import expert_stacks
from qlora.recipe import Base, Recipe

PROJECTIONS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small gpt-oss with random MXFP4 experts, as the published checkpoints store them."""
    folder = tmp_path_factory.mktemp("mxfp4")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config("gpt_oss", num_hidden_layers=2, vocab_size=2048)).save_pretrained(
        folder
    )
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn"],
    }
    (folder / "config.json").write_text(json.dumps(fields))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("bundled/base") / file, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_in_mxfp4_become_nf4_or_16_bits(checkpoint: Path, dtype: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), quantization_config=Mxfp4Config(dequantize=True)
    )
    base = Base(model=str(checkpoint), compute_dtype=dtype)
    model = load_base(base)
    stacks = expert_stacks(model)
    assert len(stacks) == 4
    assert precision_of(model).share > 0.9
    for name, stack in stacks.items():
        for number, matrix in enumerate(reference.get_parameter(name)):
            assert matrix.abs().max() > 0
            assert torch.equal(stack.matrix(number, torch.float32).T, nf4.rounded(matrix))
    dense = load_base(base.model_copy(update={"quantization": "none"}))
    for name in stacks:
        assert torch.equal(dense.get_parameter(name), reference.get_parameter(name))


def test_a_merge_writes_16_bits_that_transformers_reads(
    checkpoint: Path, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe.load(recipe_file(base={"model": str(checkpoint)}))
    run = finished_run(recipe, size=0.2)
    live = logits(load_adapter(load_base(recipe.base), run / "adapter", any_base=True))
    made = merge(run, tmp_path / "merged", onto="dequantized", max_tokens=60)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    before = logits(load_base(recipe.base))
    error, effect = ((x - live).abs().amax(-1).median() for x in (logits(merged), before))
    assert error < 0.03 * effect
    stored = sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))
    assert MergeSource(recipe.base, run / "adapter").bytes("dequantized") == pytest.approx(stored, rel=0.02)
    assert made.judged


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(24).view(2, 12) * 7).logits.float()
    return result


def test_no_tensor_of_it_counts_as_unused(checkpoint: Path) -> None:
    base = Base(model=str(checkpoint))
    assert unused_tensors(base, load_config(base)) == []
