"""Adapters are exchanged with PEFT in both directions: all config fields, GPT-2's layers, and the choice of layers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from qlora.adapter import (
    LoRALinear,
    LoraSpec,
    adapt,
    load_adapter,
    lora_layers,
    save_adapter,
    trainable_parameters,
)
from qlora.adapter.config import HONOURED, INFORMATION, NEUTRAL, NOTHING, REFUSED
from qlora.adapter.trained_parts import MODULES, TOKENS
from qlora.errors import ModelError
from qlora.model.load import load_base
from qlora.quantization import nf4
from qlora.recipe import Base

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LLAMA = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)
GPT2 = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=64)


def base(config: Any = LLAMA) -> nn.Module:
    """Return the base with the same weights at every call, in fp32 and without dropout."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24)[None]).logits


def fill(model: nn.Module) -> None:
    """Set A and B far from zero, so that every layer changes the logits."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


def theirs(folder: Path, config: Any = LLAMA, **settings: Any) -> nn.Module:
    """Return PEFT's adapter on a new base, also saved to `folder`."""
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    } | settings
    model = peft.get_peft_model(base(config), peft.LoraConfig(**settings)).eval()
    fill(model)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


FIELDS: dict[str, dict[str, Any]] = {
    "r": {"r": 3},
    "lora_alpha": {"lora_alpha": 20},
    "lora_dropout": {"lora_dropout": 0.25},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {
        "rank_pattern": {
            r"[01]\..*\.v_proj": 2,
            r"layers\.2\..*v.*": 5,
            "^model.layers.2.self_attn.q_proj": 7,
        }
    },
    "alpha_pattern": {"alpha_pattern": {r"layers\.[02]\..*q_proj": 1.5, "v_proj": 3, ".*proj": 24}},
    "patterns that fit no layer": {"rank_pattern": {"proj$": 2, "oj": 3, "layers.1": 4, "q": 5}},
    "target_modules": {"target_modules": ["mlp.up_proj", "model.layers.1.self_attn.o_proj", "no.such.layer"]},
    "target_modules, an expression": {"target_modules": r".*layers\.[01].*(q|down)_proj"},
    "target_modules, all": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["model.layers.1.self_attn.q_proj", "2.self_attn.v_proj"]},
    "exclude_modules, an expression": {"exclude_modules": r".*layers\.0\..*"},
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "layers_to_transform, one": {"layers_to_transform": 1},
    "layers_pattern": {"layers_to_transform": [1, 2], "layers_pattern": ["blocks", "layers"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("case", FIELDS)
def test_a_round_trip_with_peft_keeps_every_number(tmp_path: Path, case: str) -> None:
    """PEFT -> here -> PEFT -> here gives the same fp32 logits at each stop."""
    theirs(tmp_path / "theirs", **FIELDS[case])
    # Reload with PEFT: it saves patterns sorted, so the first pattern that matches a layer may differ from training
    expected = logits(peft.PeftModel.from_pretrained(base(), tmp_path / "theirs"))
    assert (expected - logits(base())).abs().max() > 0.1
    model = load_adapter(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), expected, rtol=1e-5, atol=1e-5)
    back.save_pretrained(tmp_path / "again")
    again = load_adapter(base(), tmp_path / "again")
    assert described(again) == described(model)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def described(model: nn.Module) -> dict[str, Any]:
    layers = lora_layers(model)
    return {name: (x.rank, x.alpha, x.scaling, x.dropout, x.lora_b.tolist()) for name, x in layers.items()}


def test_the_name_of_the_base_comes_along(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs")
    edit(tmp_path / "theirs", base_model_name_or_path="some/base", revision="v2")
    model = load_adapter(base(), tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", base_model="some/base", revision="v2")
    read = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert (read.base_model_name_or_path, read.revision, read.task_type) == ("some/base", "v2", "CAUSAL_LM")


def test_every_field_of_peft_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    classes = [set(HONOURED), set(INFORMATION), set(REFUSED), {MODULES, TOKENS}]
    assert fields - set().union(*classes) == set(), "a new field of PEFT: obey it, refuse it, or say why not"
    assert sum(map(len, classes)) == len(set().union(*classes)), "no field has two classes"
    assert set(NEUTRAL) <= set(REFUSED)
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    for field in REFUSED:
        assert defaults[field] in NEUTRAL.get(field, NOTHING), f"{field}: PEFT's default would be refused"


SET = {
    "bias": "lora_only",
    "init_lora_weights": "pissa_niter_4",
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [5],
}


@pytest.mark.parametrize("field", [*sorted(REFUSED.keys() - {"use_dora"}), "a_field_of_tomorrow"])
def test_a_field_that_cannot_be_obeyed_is_refused_by_name(tmp_path: Path, field: str) -> None:
    theirs(tmp_path)
    value = SET.get(field, {"beta": 1} if field.endswith("config") else True)
    edit(tmp_path, **{field: value})
    model = base()
    with pytest.raises(ModelError, match=f"{CONFIG}: {field} = .* is not supported"):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)
    edit(tmp_path, **{field: NEUTRAL.get(field, NOTHING)[0]})
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("field", INFORMATION)
def test_a_field_that_only_informs_changes_nothing(tmp_path: Path, field: str) -> None:
    expected = logits(theirs(tmp_path))
    edit(tmp_path, **{field: {"anything": 1}})
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible", "ignore:Adapter 'default'")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True}, "lora_bias = true"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            r"embed_tokens\.base_layer\.weight is a weight of the base.*save_embedding_layers=False",
        ),
        ({"init_lora_weights": "olora"}, 'init_lora_weights = "olora"'),
    ],
)
def test_real_adapters_of_other_kinds_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    theirs(tmp_path, **settings)
    with pytest.raises(ModelError, match=message):
        load_adapter(base(), tmp_path)


CHOICES: list[dict[str, Any]] = [
    {"target_modules": ["proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "model"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers|h"},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": []},
    {"target_modules": "Q_PROJ"},
    {"target_modules": "ALL-linear", "exclude_modules": ["mlp.up_proj", "self_attn"]},
    {"target_modules": ["model.layers.0.mlp.up_proj", ".*"]},
    {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
]


@pytest.mark.filterwarnings(
    "ignore:You have passed exclude_modules", "ignore:Setting `save_embedding_layers`"
)
@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_the_layers_are_those_that_peft_would_choose(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The tensors name the layers that PEFT chose; if our choice differs, the adapter is refused."""
    try:
        reference = theirs(tmp_path, **settings)
    except ValueError:  # PEFT finds no layer, so there is no adapter to load
        theirs(tmp_path)
        edit(tmp_path, **settings)
        with pytest.raises(ModelError, match="match no layer"):
            load_adapter(base(), tmp_path)
        return
    edit(tmp_path, **settings)  # as the user set it, not as PEFT resolved it
    torch.testing.assert_close(
        logits(load_adapter(base(), tmp_path)), logits(reference), rtol=1e-5, atol=1e-5
    )


# GPT-2 stores the weights of its linears as [in, out]


def test_gpt2_gives_peft_s_logits_and_gradients(tmp_path: Path) -> None:
    reference = theirs(tmp_path, GPT2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = load_adapter(base(GPT2), tmp_path)
    assert len(lora_layers(model)) == 8
    assert all(layer.fan_in_fan_out for layer in lora_layers(model).values())
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-6, atol=1e-6)
    ids = torch.arange(24)[None]
    wanted = {}
    for network in (reference, model):
        network(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in reference.named_parameters():
        wanted[name] = parameter.grad
    for name, parameter in trainable_parameters(model).items():
        layer, _, half = name.rpartition(".")
        expected = wanted[f"base_model.model.{layer}.lora_{half[-1].upper()}.default.weight"]
        assert expected.any()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.filterwarnings("error")  # PEFT warns if fan_in_fan_out does not fit the layers
def test_gpt2_goes_to_peft(tmp_path: Path) -> None:
    model = adapt(base(GPT2), LoraSpec(rank=4, targets="attention", dtype=torch.float32))
    fill(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] is True
    loaded = peft.PeftModel.from_pretrained(base(GPT2), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)


def test_the_layers_decide_about_fan_in_fan_out(tmp_path: Path) -> None:
    """A wrong fan_in_fan_out in the config is corrected, as PEFT corrects it."""
    expected = logits(theirs(tmp_path / "gpt2", GPT2, target_modules=["c_attn"], fan_in_fan_out=True))
    edit(tmp_path / "gpt2", fan_in_fan_out=False)
    torch.testing.assert_close(
        logits(load_adapter(base(GPT2), tmp_path / "gpt2")), expected, rtol=1e-6, atol=1e-6
    )
    expected = logits(theirs(tmp_path / "llama"))
    edit(tmp_path / "llama", fan_in_fan_out=True)
    torch.testing.assert_close(
        logits(load_adapter(base(), tmp_path / "llama")), expected, rtol=1e-5, atol=1e-5
    )


def test_lora_on_a_single_conv1d() -> None:
    conv = Conv1D(5, 7)
    layer = LoRALinear(conv, LoraSpec(rank=2, alpha=3, dtype=torch.float64)).double()
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    update = layer.scaling * layer.lora_b @ layer.lora_a  # [out, in]
    torch.testing.assert_close(layer(x), x @ (conv.weight + update.T) + conv.bias)
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("init", ["pretrained", "random", "synthetic"])
def test_gpt2_in_nf4_has_the_same_layers_however_it_is_made(tmp_path: Path, init: str) -> None:
    base(GPT2).save_pretrained(tmp_path)
    model = load_base(Base(model=str(tmp_path), init=init, compute_dtype="float32"))
    shapes = {n: tuple(m.quant_state.shape) for n, m in model.named_modules() if nf4.is_nf4(m)}
    assert len(shapes) == 8
    assert shapes["transformer.h.0.attn.c_attn"] == (3 * 64, 64)
    if init == "pretrained":
        reference = theirs(tmp_path / "adapter", GPT2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        for name in shapes:  # the same rounding in the reference, which keeps its layers unquantized
            conv = reference.get_submodule(f"base_model.model.{name}")
            weight = getattr(conv, "base_layer", conv).weight
            rounded = nf4.quantize(weight.data.T)
            weight.data = nf4.dequantize(rounded, rounded.quant_state, torch.float32).T
        model = load_adapter(model, tmp_path / "adapter")
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)


def test_weights_of_fewer_bits_keep_their_dtype(tmp_path: Path) -> None:
    theirs(tmp_path)
    half: Callable[[Tensor], Tensor] = Tensor.half
    save_file({k: half(t) for k, t in load_file(tmp_path / TENSORS).items()}, tmp_path / TENSORS)
    model = load_adapter(base(), tmp_path)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float16}
    expected = peft.PeftModel.from_pretrained(base(), tmp_path)  # PEFT reads them as fp32
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
