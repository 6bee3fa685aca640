"""Merges of mixtures: experts in the layout of the files, and those that transformers replaces in 4-bit models."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures_for_tests import config
from mixtures_for_tests import logits
from runs_for_tests import finished_run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from qlora import bundled
from qlora.adapter import load_adapter
from qlora.errors import UsageError
from qlora.merging.merge import merge
from qlora.merging.write import MergeSource
from qlora.model.load import load_base
from qlora.recipe import Recipe
from qlora.storage.safetensors_files import ShardReader


def test_nf4_is_no_choice_if_transformers_could_not_read_it(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = Llama4TextConfig(
        hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=2048, num_local_experts=2, num_experts_per_tok=1,
        interleave_moe_layer_step=1, attention_chunk_size=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base = tmp_path / "base"
    Llama4ForCausalLM(config).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("bundled/base") / file, base)
    made = Recipe.load(recipe_file(base={"model": str(base), "allow_unquantized": True}))
    run = finished_run(made)
    with pytest.raises(UsageError, match=r"another class for the Llama4TextExperts of .*--onto dequantized"):
        merge(run, tmp_path / "nf4", onto="nf4", max_tokens=0)
    assert not (tmp_path / "nf4").exists()
    merged = merge(run, tmp_path / "best", max_tokens=60)
    assert {one.name for one in merged.judged} == {"original", "dequantized"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "best")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_merged_into_the_layout_of_the_files(
    recipe_file: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        config(architecture, num_hidden_layers=2, vocab_size=2048), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    made.save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("bundled/base") / file, base)
    recipe = Recipe.load(recipe_file(base={"model": str(base)}))
    run = finished_run(recipe, size=0.3)
    keys = ShardReader(base).stored.keys()
    for onto in ("original", "dequantized"):
        source = MergeSource(recipe.base, run / "adapter")
        tensors = {name: tensor for part in source.tensors(onto) for name, tensor in part.items()}
        assert tensors.keys() == keys
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        shutil.copy(base / "config.json", tmp_path)
        merged = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, experts_implementation="eager"
        )
        quantization = "none" if onto == "original" else "nf4"
        plain = load_base(recipe.base.model_copy(update={"quantization": quantization}))
        before = logits(plain)
        live = logits(load_adapter(plain, run / "adapter", any_base=True))
        # of a typical token: rounding to bf16 can turn a router's choice for another
        error, effect = ((x - live).abs().amax(-1).median() for x in (logits(merged), before))
        assert error < 0.02 * effect
    trained = merge(run, tmp_path / "best", max_tokens=60)
    assert {one.name for one in trained.judged} >= {"original", "dequantized"}
