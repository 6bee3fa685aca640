"""DoRA equals its equation and PEFT, starts as the base, and its runs support what LoRA's support."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import recipe
from commands_for_tests import qlora
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
from safetensors.torch import save_file
from test_memory_forecast import assert_right, foreseen, measured
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qlora.adapter import LoraSpec, load_adapter, save_adapter, trainable_parameters
from qlora.adapter.methods.dora import DoraLinear
from qlora.adapter.trained_parts import train_modules
from qlora.adapter.wrap import wrap
from qlora.errors import ModelError
from qlora.memory.workload import assumed
from qlora.ops.dora_linear import dora_linear, row_norms, row_squares
from qlora.ops.dropout import draw
from qlora.ops.products import Linear, Update
from qlora.optim import Optimizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def equation_5(
    x: Tensor, dropped: Tensor, linear: nn.Linear, parts: tuple[Tensor, ...], scaling: float
) -> Tensor:
    """Return the output as the paper writes it: W x plus the change of the weight times the dropped input."""
    a, b, magnitude = parts
    direction = linear.weight + scaling * b @ a
    weight = (magnitude / direction.norm(dim=1).detach())[:, None] * direction
    return F.linear(x, linear.weight, linear.bias) + F.linear(dropped, weight - linear.weight)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_those_of_autograd_in_fp64(rate: float, bias: bool) -> None:
    linear = nn.Linear(7, 5, bias=bias).double().requires_grad_(False)
    parts = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 7), (5, 3), (5,))]
    x, weights = torch.randn(2, 6, 7, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    dropout = draw(rate)
    mask = 1 if dropout is None else dropout.mask(x.view(12, 7)).view_as(x).double() / (1 - rate)
    found, wanted = ([x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parts)] for _ in "ab")
    constants = Linear(linear.weight, None, linear.bias, 1.7, dropout)
    y = dora_linear(found[0], constants, Update(*found[1:3]), found[3], row_squares(linear.weight))
    reference = equation_5(wanted[0], wanted[0] * mask, linear, tuple(wanted[1:]), 1.7)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    for output in (y, reference):
        (output.tanh() * weights).sum().backward()
    for leaf, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_row_norms_need_no_dense_product() -> None:
    weight, a, b = torch.randn(9, 8), torch.randn(3, 8), torch.randn(9, 3)
    wanted = (weight + 0.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, row_squares(weight), Update(a, b), 0.5), wanted)
    opposite = row_norms(-2 * b @ a, row_squares(-2 * b @ a), Update(a, b), 2.0)  # W + s B A = 0
    assert (opposite > 0).all()
    assert (opposite < 0.05).all()


def test_norms_that_generation_keeps_are_forgotten_when_the_adapter_changes() -> None:
    layer, x = DoraLinear(nn.Linear(8, 6), LoraSpec(rank=4, dtype=torch.float32)).eval(), torch.randn(1, 8)

    def checked() -> None:
        with torch.no_grad():
            for _ in range(2):  # the second time with the norms of the first
                wanted = F.linear(x, layer.merged_weight(), layer.base.bias)
                torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)

    checked()
    nn.init.normal_(layer.lora_b)  # in place, as by loading another adapter
    checked()
    layer.lora_a = nn.Parameter(torch.randn(4, 8))
    checked()
    optimizer = Optimizer(
        trainable_parameters(layer), name="adamw"
    )  # it changes flat storage, not the parameters
    layer(x).square().sum().backward()
    optimizer.step(0.5)
    checked()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_it_starts_as_the_base_and_trains_every_part(
    tiny_llama: Path, dtype: torch.dtype, quantized: bool
) -> None:
    plain = tiny(tiny_llama, dtype, quantized=quantized)
    model = adapted(tiny(tiny_llama, dtype, quantized=quantized), "dora")
    assert torch.equal(logits(model), logits(plain))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = trainable_parameters(model)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b", "magnitude"}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert parameter.grad.any() != name.endswith("lora_a"), "B is zero, so A has no gradient yet"


def their_logits(folder: Path, base: nn.Module) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(base, folder))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_same_with_our_adapter(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype, quantized: bool
) -> None:
    model = adapted(
        tiny(tiny_llama, dtype, quantized=quantized), "dora", 0.05, rank=4, rank_pattern={"q_proj": 2}
    )
    fields = assert_saved_and_loaded(model, tiny(tiny_llama, dtype, quantized=quantized), tmp_path)
    assert fields["use_dora"] is True
    assert fields.keys() <= peft.LoraConfig().to_dict().keys()
    plain = tiny(tiny_llama, dtype, quantized=quantized)
    effect = (logits(model) - logits(plain)).abs().max()
    difference = (their_logits(tmp_path, plain) - logits(model)).abs().max()
    assert effect > 0.05
    assert difference < (1e-4 if dtype == torch.float32 else 0.2) * effect


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_dropout": 0.1}])
def test_an_adapter_of_peft_computes_the_same_here(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(tiny(tiny_llama, quantized=True), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tiny(tiny_llama, quantized=True), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_a_merged_model_computes_the_same(tiny_llama: Path) -> None:
    for quantized in (False, True):
        assert_merges(
            adapted(tiny(tiny_llama, quantized=quantized), "dora", 0.1), tiny(tiny_llama, quantized=quantized)
        )


def test_a_conv1d_is_scaled_by_its_outputs() -> None:
    model = nn.Sequential(Conv1D(5, 7))
    layer = DoraLinear(model[0], LoraSpec(rank=2))
    nn.init.normal_(layer.lora_b)
    with torch.no_grad():
        layer.magnitude.mul_(1.5)
    wrap(model, {"0": layer})
    x = torch.randn(3, 7)
    torch.testing.assert_close(
        model(x), F.linear(x, layer.merged_weight(), layer.base.bias), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(layer.merged_weight().norm(dim=1), layer.magnitude.detach())


def test_training_resumes_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    assert_resumes(lambda: adapted(tiny(tiny_llama), "dora", dropout=0.1), tmp_path)


@pytest.mark.slow
def test_its_memory_is_forecast(tmp_path: Path) -> None:
    made = recipe(
        tmp_path, "llama", layers=4, adapter={"method": "dora", "dropout": 0.1}, data={"held_out": 0}
    )
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


def test_the_file_for_diffusers_refuses_it_by_name(tmp_path: Path) -> None:
    model = adapted(nn.ModuleDict({"a": nn.Linear(4, 4)}), "dora")
    with pytest.raises(
        ModelError, match=r"adapter of DoRA has trained norms as well \(use_dora\)\. Save it without"
    ):
        save_adapter(model, tmp_path, diffusers="unet")


def test_parts_beside_it_are_in_the_json_of_inspect(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    save_adapter(train_modules(adapted(base, "dora"), ["norm"]), tmp_path / "adapter")
    shown = qlora("adapter", "inspect", tmp_path / "adapter", "--base", tmp_path, "--json")
    assert shown.returncode == 0, shown.stderr
    parts = json.loads(shown.stdout)["parts"]
    assert parts == {f"base_model.model.norm.{name}": [4] for name in ("bias", "weight")}


def test_a_cast_of_the_model_leaves_the_start_at_the_base() -> None:
    linear = nn.Linear(40, 30, bias=False)
    layer = DoraLinear(deepcopy(linear), LoraSpec(4)).to(torch.bfloat16)
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    assert layer.magnitude.dtype == layer.squares.dtype == torch.float32
    assert torch.equal(layer(x), linear.to(torch.bfloat16)(x))
    assert layer.double().magnitude.dtype == layer.squares.dtype == torch.float64


def test_a_row_of_zeros_has_no_relative_change() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = DoraLinear(linear, LoraSpec(2))
    assert layer.numbers(linear.weight)["row norms moved"] == 0
    with torch.no_grad():
        layer.magnitude.mul_(1.5)
    assert layer.numbers(linear.weight)["row norms moved"] == pytest.approx(0.5)
    assert layer.numbers(torch.zeros(3, 4))["row norms moved"] == 0
