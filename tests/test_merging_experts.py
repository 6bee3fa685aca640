"""A merge of a model whose experts are another class in transformers' 4-bit models."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs_for_tests import finished_run
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from qlora import bundled
from qlora.errors import UsageError
from qlora.merging.merge import merge
from qlora.recipe import Recipe


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
