"""Agreement with PEFT's LoRA on the same NF4 weights: loss, gradients, ten training steps, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora.adapter import (
    LoraSpec,
    adapt,
    load_adapter,
    lora_layers,
    save_adapter,
    select,
    trainable_parameters,
)
from qlora.quantization import nf4

peft = pytest.importorskip("peft")
# PEFT 0.21 reads a transformers 4 attribute, which transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 8.0


def base(folder: Path) -> nn.Module:
    """Return the tiny Llama in NF4 with fp32 compute and the same weights at every call."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in select(model, "all-linear"):
        model.set_submodule(name, nf4.NF4Linear(nf4.quantize(model.get_submodule(name).weight)))
    return model.train()


def theirs(folder: Path, **settings: Any) -> nn.Module:
    config = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": PROJECTIONS,
        "task_type": "CAUSAL_LM",
    } | settings
    return peft.get_peft_model(base(folder), peft.LoraConfig(**config))


def ours(folder: Path, **settings: Any) -> nn.Module:
    arguments = {"rank": RANK, "alpha": ALPHA, "targets": "all-linear", "dtype": torch.float32} | settings
    return adapt(base(folder), LoraSpec(**arguments))


def their_name(name: str) -> str:
    """Return PEFT's name for one of our parameters."""
    layer, _, which = name.rpartition(".")
    return f"base_model.model.{layer}.lora_{which[-1].upper()}.default.weight"


def share(source: nn.Module, target: nn.Module) -> None:
    """Copy PEFT's A and B to our layers, with nonzero B so that every gradient is nonzero."""
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in trainable_parameters(target).items():
            if name.endswith("lora_b"):
                theirs[their_name(name)].normal_(0, 0.1)
            parameter.copy_(theirs[their_name(name)])


def loss(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("use_rslora", [False, True])
def test_loss_and_gradients_agree_with_peft(tiny_llama: Path, use_rslora: bool) -> None:
    reference = theirs(tiny_llama, use_rslora=use_rslora)
    model = ours(tiny_llama, scaling="alpha/sqrt(rank)" if use_rslora else "alpha/rank")
    share(reference, model)
    expected, found = loss(reference, 0), loss(model, 0)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    parameters = trainable_parameters(model)
    assert {their_name(name) for name in parameters} == gradients.keys()
    for name, parameter in parameters.items():
        wanted = gradients[their_name(name)]
        assert wanted.any()
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7, msg=name)


def test_ten_training_steps_agree_with_peft(tiny_llama: Path) -> None:
    reference, model = theirs(tiny_llama), ours(tiny_llama)
    share(reference, model)
    curves: list[list[float]] = []
    for network in (reference, model):
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for step in range(10):
            optimizer.zero_grad()
            value = loss(network, step % 2)
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.1, "the loss must fall"
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    final = dict(reference.named_parameters())
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(parameter, final[their_name(name)], rtol=1e-3, atol=1e-5, msg=name)


def test_our_dropout_has_the_distribution_of_pefts(tiny_llama: Path) -> None:
    """One seed gives the libraries different masks, so mean and spread of the loss are compared over many draws."""
    reference, model = theirs(tiny_llama, lora_dropout=0.2), ours(tiny_llama, dropout=0.2)
    share(reference, model)
    with torch.no_grad():
        draws = [torch.stack([loss(network, 0) for _ in range(40)]) for network in (reference, model)]
    (mean, found_mean), (spread, found_spread) = (
        [d.mean().item() for d in draws],
        [d.std().item() for d in draws],
    )
    assert found_mean == pytest.approx(mean, abs=5 * spread / 40**0.5)
    assert found_spread == pytest.approx(spread, rel=0.6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}, "alpha_pattern": {"v_proj": 1.5}},
        {"scaling": "alpha", "alpha": 0.1, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1.5}},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_adapter_gives_the_same_logits_in_peft(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = ours(tiny_llama, dtype=dtype, dropout=0.1, **settings)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(tiny_llama), tmp_path)
    ids = torch.arange(20)[None]
    plain = base(tiny_llama).eval()(input_ids=ids).logits
    expected = model.eval()(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    again = lora_layers(load_adapter(base(tiny_llama), tmp_path))
    assert {n: x.scaling for n, x in again.items()} == {n: x.scaling for n, x in lora_layers(model).items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"v_proj": 2}}],
)
def test_a_peft_adapter_gives_the_same_logits_here(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    reference = theirs(tiny_llama, **settings)
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    reference.save_pretrained(tmp_path)
    model = load_adapter(base(tiny_llama), tmp_path)
    ids = torch.arange(20)[None]
    expected = reference.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_every_default_of_peft_s_config_can_be_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    """A field that a later PEFT writes with a harmless value must not make its adapters unreadable."""
    theirs(tiny_llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config) > 30
    load_adapter(base(tiny_llama), tmp_path)


def test_our_config_has_only_fields_of_peft(tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(ours(tiny_llama), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() <= peft.LoraConfig().to_dict().keys()
