"""VeRA equals its equation and PEFT, starts as the base, shares its projections, and can do what LoRA can."""

import json
from pathlib import Path

import pytest
import torch
from architectures_for_tests import recipe
from methods_for_tests import (
    IDS,
    TARGETS,
    adapted,
    assert_merges,
    assert_resumes,
    assert_saved_and_loaded,
    logits,
    tiny,
)
from safetensors.torch import load_file, save_file
from test_memory_forecast import assert_right, foreseen, measured
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qlora.adapter import load_adapter, save_adapter, trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.adapter.methods.vera import VeraLinear, VeraSpec
from qlora.errors import ModelError, RecipeError
from qlora.memory.workload import assumed
from qlora.ops.dropout import draw
from qlora.ops.products import Linear
from qlora.ops.vera_linear import vera_linear
from qlora.recipe import Recipe

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_outputs_and_gradients_equal_those_of_autograd_in_fp64(rate: float) -> None:
    linear = nn.Linear(7, 5).double().requires_grad_(False)
    a, b, *leaves = (torch.randn(s, dtype=torch.float64) for s in ((9, 7), (5, 9), (9,), (5,), (2, 6, 7)))
    dropout, weights = draw(rate), torch.randn(2, 6, 5, dtype=torch.float64)
    mask = 1 if dropout is None else dropout.mask(leaves[2].view(12, 7)).view(2, 6, 7).double() / (1 - rate)
    found, wanted = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in "ab")
    y = vera_linear(found[2], Linear(linear.weight, None, linear.bias, dropout=dropout), a, b, *found[:2])
    reference = linear(wanted[2]) + wanted[1] * F.linear(wanted[0] * F.linear(wanted[2] * mask, a), b)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    for output in (y, reference):
        (output.tanh() * weights).sum().backward()
    for leaf, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_it_starts_as_the_base_and_trains_two_vectors_a_layer(
    tiny_llama: Path, dtype: torch.dtype, quantized: bool
) -> None:
    plain = tiny(tiny_llama, dtype, quantized=quantized)
    model = adapted(tiny(tiny_llama, dtype, quantized=quantized), "vera", rank=32)
    assert torch.equal(logits(model), logits(plain))
    layers = VeraLinear.of(model)
    trained = trainable_parameters(model)
    assert sum(p.numel() for p in trained.values()) == sum(
        32 + layer.out_features for layer in layers.values()
    )
    assert len({layer.projections for layer in layers.values()}) == 1
    first = layers["model.layers.0.self_attn.q_proj"].projections
    assert (first.a.shape, first.b.shape) == ((32, 128), (128, 32))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        p.grad is not None and p.grad.any() for name, p in trained.items() if name.endswith("lambda_b")
    )
    assert "rank 32 is small for VeRA" in METHODS["vera"].notes(model)[0]
    assert not METHODS["vera"].notes(adapted(tiny(tiny_llama), "vera", rank=64))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_same_with_our_adapter(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype, quantized: bool
) -> None:
    model = adapted(tiny(tiny_llama, dtype, quantized=quantized), "vera", 0.1, rank=16)
    fields = assert_saved_and_loaded(model, tiny(tiny_llama, dtype, quantized=quantized), tmp_path)
    assert fields.keys() <= peft.VeraConfig().to_dict().keys()
    plain = tiny(tiny_llama, dtype, quantized=quantized)
    effect = (logits(model) - logits(plain)).abs().max()
    theirs = logits(peft.PeftModel.from_pretrained(plain, tmp_path))
    assert effect > 0.05
    assert (theirs - logits(model)).abs().max() < (1e-4 if dtype == torch.float32 else 0.2) * effect


def test_an_adapter_of_peft_computes_the_same_here(tiny_llama: Path, tmp_path: Path) -> None:
    config = peft.VeraConfig(r=16, target_modules=TARGETS, vera_dropout=0.1, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny(tiny_llama, quantized=True), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tiny(tiny_llama, quantized=True), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    assert len({layer.projections for layer in VeraLinear.of(model).values()}) == 1


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(adapted(tiny(tiny_llama), "vera", rank=4), tmp_path)
    file, tensors = tmp_path / "adapter_config.json", load_file(tmp_path / "adapter_model.safetensors")
    narrow = {**tensors, "base_model.vera_A": tensors["base_model.vera_A"][:, :9].clone()}
    save_file(narrow, tmp_path / "adapter_model.safetensors")
    model = tiny(tiny_llama)
    with pytest.raises(
        ModelError, match=r"vera_A is \[4, 9\], the model needs rank 4 and a width of at least 128"
    ):
        load_adapter(model, tmp_path)
    assert not VeraLinear.of(model)
    file.write_text(json.dumps({**json.loads(file.read_text()), "save_projection": False}))
    with pytest.raises(ModelError, match="save_projection = false is not supported"):
        load_adapter(model, tmp_path)


def test_a_merged_model_computes_the_same(tiny_llama: Path) -> None:
    for quantized in (False, True):
        plain = tiny(tiny_llama, quantized=quantized)
        assert_merges(adapted(tiny(tiny_llama, quantized=quantized), "vera", 0.2, rank=16), plain)


def test_a_conv1d_is_scaled_by_its_outputs() -> None:
    layer = VeraLinear(Conv1D(5, 7), VeraSpec(rank=3))
    nn.init.normal_(layer.lambda_b)
    x = torch.randn(3, 7)
    wanted = F.linear(x, layer.merged_weight(), layer.base.bias)
    assert (wanted - layer.base(x)).abs().max() > 0.01
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_training_resumes_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    assert_resumes(lambda: adapted(tiny(tiny_llama), "vera", rank=32, dropout=0.1), tmp_path, lr=0.2)


def test_its_memory_is_forecast_with_projections_counted_once(tmp_path: Path) -> None:
    settings = {"method": "vera", "rank": 256, "targets": "all-linear"}
    made = recipe(tmp_path, "llama", layers=4, adapter=settings, data={"held_out": 0})
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


def test_keys_of_trained_products_have_no_effect() -> None:
    settings = {"base": {"model": "bundled/base"}, "data": {"source": "a.jsonl"}}
    with pytest.raises(RecipeError, match=r"adapter\.alpha: has no effect with adapter\.method: vera"):
        Recipe.from_dict({**settings, "adapter": {"method": "vera", "alpha": 4}})
