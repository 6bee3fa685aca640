"""The share of a base in NF4 is counted, printed and the same for the config alone, and for the loaded base."""

import re
from pathlib import Path
from typing import Any

import architectures_for_tests as small
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.adapter import LoraSpec, adapt
from qlora.adapter.targets import select
from qlora.errors import ModelError
from qlora.memory.architecture import architecture
from qlora.memory.estimate import Estimate, estimate
from qlora.memory.no_forecast import NoForecastError, failure_named
from qlora.model.load import load_base, load_config, meta_base
from qlora.model.precision import EXPERTS, ROUTERS, SKIPPED, Precision, precision_of
from qlora.model.prepare import unreached_notes
from qlora.quantization import nf4
from qlora.quantization.expert_stack import expert_stacks
from qlora.quantization.routers import routers
from qlora.quantization.transformers_loader import nf4_experts, nf4_layers, overruled_settings
from qlora.recipe import Base
from qlora.runtime import fake

MIXTURES = ("hunyuan_v1_moe", "dbrx", "jetmoe", "mixtral", "qwen2_moe")


def saved(folder: Path, name: str, **changes: Any) -> Base:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small.config(name, **changes), dtype=torch.float32)
    model.save_pretrained(folder)
    return Base(model=str(folder), compute_dtype="float32", allow_unquantized=True)


def meta(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small.config(name))


def test_biases_of_experts_are_no_weights_that_are_not_quantized() -> None:
    model = meta("gpt_oss")  # its biases have two dimensions
    assert precision_of(model, [*nf4_layers(model), *nf4_experts(model)]).kept == {}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", set()),
        ("falcon", {"layers of the class FalconLinear"}),
        ("mixtral", set()),
        ("jetmoe", {EXPERTS, ROUTERS}),
        ("hunyuan_v1_moe", {ROUTERS}),
    ],
)
def test_config_and_loaded_base_agree_about_what_is_quantized(
    tmp_path: Path, name: str, kinds: set[str]
) -> None:
    base = saved(tmp_path, name)
    model = load_base(base)
    found = precision_of(model)
    unquantized = meta(name)
    assert found == precision_of(unquantized, [*nf4_layers(unquantized), *nf4_experts(unquantized)])
    assert found.kept.keys() == kinds
    in_nf4 = sum(module.quant_state.shape.numel() for module in model.modules() if nf4.is_nf4(module))
    in_nf4 += sum(stack.numel() for stack in expert_stacks(model).values())
    assert found.quantized == in_nf4
    head = model.get_output_embeddings()
    matrices = {p for p in model.parameters() if p.ndim >= 2} - {
        model.get_input_embeddings().weight,
        head.weight,
    }
    routing = {
        model.get_submodule(r).weight for r in routers(model) if hasattr(model.get_submodule(r), "weight")
    }
    dense = sum(p.numel() for p in matrices - routing if p.dtype != torch.uint8)
    assert sum(number for kind, number in found.kept.items() if kind != ROUTERS) == dense
    for wanted in (*kinds, "linear weights"):
        assert wanted in found.line()


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_neither_quantized_nor_adapted(name: str) -> None:
    model = meta(name)
    named = {r for r in routers(model) if isinstance(model.get_submodule(r), nn.Linear)}
    assert bool(named) == (name in ("hunyuan_v1_moe", "dbrx", "jetmoe", "qwen2_moe"))
    assert not named & set(nf4_layers(model))
    assert not named & set(select(model, "all-linear"))
    assert not any("gate_proj" in r or "up_proj" in r for r in routers(model))


def test_a_router_stays_dense_in_the_loaded_base_and_in_the_synthetic_one(tmp_path: Path) -> None:
    base = saved(tmp_path, "hunyuan_v1_moe")
    for init in ("pretrained", "synthetic", "random"):
        model = load_base(base.model_copy(update={"init": init}))
        assert type(model.model.layers[0].mlp.gate.wg) is nn.Linear
        assert nf4.is_nf4(model.model.layers[0].self_attn.q_proj)
    assert "model.layers.0.mlp.gate.wg" not in meta_base(base).quantized


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(small.ARCHITECTURES | small.LEAKY | small.APART))
def test_the_names_equal_those_that_transformers_quantizes(tmp_path: Path, name: str) -> None:
    small.config(name).save_pretrained(tmp_path)
    assert set(nf4_layers(meta(name))) == meta_base(Base(model=str(tmp_path))).quantized


def test_a_base_with_little_in_nf4_is_refused_unless_allowed(tmp_path: Path) -> None:
    allowed = small.recipe(tmp_path, "jetmoe")
    refused = allowed.model_copy(
        update={"base": allowed.base.model_copy(update={"allow_unquantized": False})}
    )
    assert architecture(allowed, cuda=False).precision.share < 0.5
    with pytest.raises(ModelError, match=r"linear weights are in NF4.*experts.*base\.allow_unquantized=true"):
        architecture(refused, cuda=False)


def test_the_forecast_counts_what_falcon_keeps_in_16_bits(tmp_path: Path) -> None:
    base = saved(tmp_path / "model", "falcon", num_hidden_layers=2)
    recipe = small.recipe(tmp_path / "config", "llama")
    recipe = recipe.model_copy(update={"base": base})
    found = estimate(recipe)
    real = sum(p.nbytes for p in load_base(base).parameters())
    parts = found.memory["forecast"]["parts"]
    assert parts.get("base_nf4", 0) + parts["base_unquantized"] == pytest.approx(real, rel=0.02)
    assert next(found.lines()) == f"Base: {found.precision.line()}."


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "awq"])
def test_estimate_refuses_the_quantizations_that_train_refuses(tmp_path: Path, method: str) -> None:
    recipe = small.recipe(tmp_path, "llama", base={"init": "pretrained"})
    config = load_config(recipe.base)
    config.quantization_config = {"quant_method": method}
    config.save_pretrained(tmp_path)
    for attempt in (lambda: estimate(recipe), lambda: load_base(recipe.base)):
        with pytest.raises(ModelError, match=f"already quantized by {method}"):
            attempt()


def test_an_architecture_without_forecast_is_an_error_that_names_it_and_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small.recipe(tmp_path, "dbrx", layers=2)
    with pytest.raises(NoForecastError) as raised:
        estimate(recipe)
    assert re.fullmatch(
        r"no memory forecast for DbrxForCausalLM: .*\(DynamicOutputShapeException in modeling_dbrx\.py:\d+\)\. "
        r"It may train all the same: set training\.max_steps=3, .*",
        str(raised.value),
    )
    assert "aten" not in str(raised.value)

    @failure_named("GPT")
    def fail() -> None:
        fake.LOG.error("failed while attempting to run meta for aten.add.Tensor")
        raise RuntimeError("Attempting to broadcast")

    with pytest.raises(NoForecastError, match=r"forecast for GPT: .*RuntimeError in test_precision\.py"):
        fail()
    assert not [record for record in caplog.records if record.name == fake.LOG.name]


@pytest.mark.parametrize("name", ["nemotron", "doge", "deepseek_v32", "glm_moe_dsa"])
def test_models_that_compute_with_their_mask_are_forecast_with_one(name: str, tmp_path: Path) -> None:
    assert architecture(small.recipe(tmp_path / name, name, layers=2), cuda=False).padded
    assert not architecture(small.recipe(tmp_path / "llama", "llama", layers=2), cuda=False).padded


def test_settings_that_an_nf4_checkpoint_overrules_are_named_and_forecast(tmp_path: Path) -> None:
    first = saved(tmp_path / "dense", "llama").model_copy(update={"double_quant": False})
    load_base(first).save_pretrained(tmp_path / "nf4")
    stored = Base(model=str(tmp_path / "nf4"), compute_dtype="float32", block_size=128)
    notes = overruled_settings(stored, load_config(stored))
    assert [note.split("=")[0] for note in notes] == ["base.double_quant", "base.block_size"]
    assert "double_quant=false" in notes[0]
    assert "block_size=64" in notes[1]
    assert overruled_settings(first, load_config(first)) == []
    recipe = small.recipe(tmp_path / "config", "llama")
    statistics = [
        estimate(recipe.model_copy(update={"base": base})).memory["forecast"]["parts"][
            "quantization_statistics"
        ]
        for base in (first, stored)
    ]
    assert statistics[0] == statistics[1]


def test_layers_that_a_checkpoint_excludes_are_counted(tmp_path: Path) -> None:
    config = small.config("llama", num_hidden_layers=3)
    config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "model.layers.0"],
    }  # fmt: skip
    recipe = small.recipe(tmp_path, "llama")
    config.save_pretrained(tmp_path)
    arch = architecture(recipe, cuda=False)
    assert arch.precision.share == pytest.approx(2 / 3)
    assert arch.precision.kept.keys() == {SKIPPED}
    assert arch.shapes.kinds() == (0, 1, 1)
    assert estimate(recipe).memory["forecast"]["parts"]["base_nf4"] == pytest.approx(
        arch.precision.quantized / 2, rel=0.1
    )


def test_the_way_out_of_a_large_mixture_is_not_a_smaller_model() -> None:
    precision = Precision(10**9, {EXPERTS: 29 * 10**9})
    parts = {"base_unquantized": 58 * 10**9, "base_nf4": 10**9}
    memory = {"forecast": {"host_bytes": 0, "total_bytes": 60 * 10**9, "parts": parts}}
    lines = list(Estimate(memory, 60 * 10**9, 24 * 2**30, None, None, [], None, precision, [], []).lines())
    assert lines[0].startswith(
        "Base: 3.3% of the 30 B linear weights are in NF4; 96.7% are not quantized: 29 B in"
    )
    assert "smaller model" not in lines[-1]
    assert "54.0 GiB are weights that are not quantized" in lines[-1]


def test_the_router_of_longcat_that_reads_its_weight_is_neither_quantized_nor_adapted() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small.config("longcat_flash"))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    router = {name for name in linears if name.endswith("router.classifier")}
    assert router
    for chosen in (nf4_layers(model), select(model, "all-linear")):
        assert chosen
        assert router.isdisjoint(chosen)


def test_adapters_that_text_does_not_reach_are_named() -> None:
    model = AutoModelForCausalLM.from_config(small.config("llama", num_hidden_layers=1))
    model.vision_tower = nn.Sequential(nn.Linear(8, 8))
    assert unreached_notes(model) == []
    adapt(model, LoraSpec(rank=2, targets=["q_proj"]))
    assert unreached_notes(model) == []
    adapt_vision = AutoModelForCausalLM.from_config(small.config("llama", num_hidden_layers=1))
    adapt_vision.vision_tower = nn.Sequential(nn.Linear(8, 8))
    adapt(adapt_vision, LoraSpec(rank=2, targets="all-linear"))
    (note,) = unreached_notes(adapt_vision)
    assert note.startswith("1 adapted layers are outside the decoder (vision_tower.0)")


@pytest.mark.parametrize("kind", ["Mistral3Config", "Qwen2_5_VLConfig"])
def test_models_without_a_causal_language_model_are_refused_with_the_way_out(
    kind: str, tmp_path: Path
) -> None:
    getattr(transformers, kind)().save_pretrained(tmp_path)
    recipe = small.recipe(tmp_path / "config", "llama")
    recipe = recipe.model_copy(update={"base": Base(model=str(tmp_path))})
    for attempt in (lambda: architecture(recipe, cuda=False), lambda: load_base(recipe.base)):
        with pytest.raises(
            ModelError, match=rf"base\.model.*no causal language model for {kind}.*text model alone"
        ):
            attempt()
