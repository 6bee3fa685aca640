"""An odd base trains, or it is refused with the true reason: its head, its tables, its layers or its values."""

from pathlib import Path
from typing import Any

import architectures_for_tests as small
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    ModernBertDecoderConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
)

from qlora.adapter.algebra import plain
from qlora.adapter.trained_rows import train_rows
from qlora.errors import ModelError, RecipeError
from qlora.memory.architecture import architecture
from qlora.memory.forecast import forecast
from qlora.memory.workload import assumed
from qlora.model.head import decoder_of, head_of
from qlora.model.precision import EXPERTS, OTHERS, precision_of
from qlora.model.prepare import build
from qlora.objective.checks import check_head
from qlora.objective.step import accumulate
from qlora.quantization import nf4
from qlora.recipe import Recipe

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {"vocab_size": 512, "n_positions": 128, "n_embd": 64, "n_layer": 1, "n_head": 4}
WITHOUT_KNOWN_LAYERS = {
    "CTRLLMHeadModel": CTRLConfig(dff=128, **SIZES),
    "OpenAIGPTLMHeadModel": OpenAIGPTConfig(**SIZES),
}


def made(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]


def recipe(folder: Path, **training: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "base": {"model": str(folder), "init": "synthetic", "compute_dtype": "float32"},
            "data": {"source": "someone/rows", "max_length": 64},
            "training": {"micro_batch_size": 2, "global_batch_size": 4, "device": "cpu", **training},
            "optimizer": {"name": "adamw"},
        }
    )


@pytest.mark.parametrize("name", WITHOUT_KNOWN_LAYERS)
def test_a_model_without_layers_to_checkpoint_is_forecast_and_trained(name: str, tmp_path: Path) -> None:
    WITHOUT_KNOWN_LAYERS[name].save_pretrained(tmp_path)
    one = recipe(tmp_path, activation_checkpointing="none")
    workload = assumed(one)
    needed_bytes = forecast(one, workload, architecture(one, cuda=False), cuda=False).total_bytes
    model, optimizer = build(one, "cpu")
    assert type(model).__name__ == name
    assert needed_bytes > sum(parameter.nbytes for parameter in model.parameters())
    assert accumulate(model, [workload.train], seed=0, step=0).sum.isfinite()
    assert optimizer.clip(1.0) > 0


@pytest.mark.parametrize("name", WITHOUT_KNOWN_LAYERS)
def test_its_forecast_names_the_key_that_a_run_would_refuse(name: str, tmp_path: Path) -> None:
    WITHOUT_KNOWN_LAYERS[name].save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=rf"{name} .*training\.activation_checkpointing=none"):
        architecture(recipe(tmp_path), cuda=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decoder_that_transformers_confuses_with_the_head_is_found(dtype: torch.dtype) -> None:
    config = ModernBertDecoderConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = made(config, dtype)
    assert decoder_of(model) is model.model
    with pytest.raises(
        ModelError, match="ModernBertDecoderForCausalLM changes its logits"
    ):  # by two more layers
        check_head(model)


def test_a_head_in_nf4_is_refused_by_its_name() -> None:
    model = made(small.config("llama", num_hidden_layers=1))
    model.lm_head = nf4.NF4Linear(nf4.quantize(model.lm_head.weight.detach()))
    with pytest.raises(ModelError, match=r"base\.model: the output head lm_head .*llm_int8_skip_modules"):
        head_of(model)


@pytest.mark.parametrize("skipped", [[], ["lm_head"]])
def test_a_head_in_nf4_is_refused_before_a_run(skipped: list[str], tmp_path: Path) -> None:
    config = small.config("llama", num_hidden_layers=1)
    config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": skipped,
    }  # fmt: skip
    config.save_pretrained(tmp_path)
    if skipped:
        assert architecture(recipe(tmp_path), cuda=False).precision
        return
    with pytest.raises(ModelError, match=r"base\.model: the output head lm_head .*llm_int8_skip_modules"):
        architecture(recipe(tmp_path), cuda=False)


def test_new_tokens_are_refused_where_a_second_table_looks_them_up() -> None:
    model = made(small.config("gemma3n_text"))
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ModelError, match=r"adapter\.train_tokens: .*embed_tokens_per_layer too"):
        train_rows(model, [rows])
    train_rows(model, [7])  # a token that has a row in both


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_weight_that_is_not_finite_is_named(value: float, quantized: bool, dtype: torch.dtype) -> None:
    model = made(small.config("llama", num_hidden_layers=2), dtype)
    layer = model.model.layers[1].mlp
    layer.up_proj.weight.data[3, 5] = value
    if quantized:
        layer.up_proj = nf4.NF4Linear(nf4.quantize(layer.up_proj.weight.detach()))
    with pytest.raises(ModelError, match=r"base\.model: model\.layers\.1\.mlp\.up_proj\.weight .*not finite"):
        check_head(model)


def test_weights_outside_linear_layers_are_not_called_experts() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(2, 8, 8))

    model = made(small.config("llama", num_hidden_layers=1))
    model.model.layers[0].mixing = Mixing()
    assert precision_of(model).kept[OTHERS] == 128
    assert EXPERTS not in precision_of(model).kept


def test_no_merge_is_advised_for_trained_experts() -> None:
    config = {"peft_type": "LORA", "modules_to_save": ["norm"]}
    assert "qlora merge" in str(plain.note(config, "run"))
    said = str(plain.note(config | {"modules_to_save": ["experts"]}, "run"))
    assert "beside the adapter" in said
    assert "qlora merge" not in said
