"""Merging in memory: the merged model computes what the adapted one computed, and rounding is not silent."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora import merge_adapter
from qlora.adapter import LoraSpec, adapt, lora_layers, trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.errors import ModelError
from qlora.model.load import load_base
from qlora.quantization import nf4
from qlora.recipe import Adapter, Base

IDS = torch.arange(20).view(2, 10) * 3


def trained(model: nn.Module, spec: LoraSpec, size: float = 0.1) -> nn.Module:
    adapt(model, spec)
    for layer in lora_layers(model).values():
        for parameter in layer.saved().values():
            nn.init.normal_(parameter, std=size)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_nf4_layers_become_dense_and_exact_or_nf4_with_a_warning(tiny_llama: Path) -> None:
    base = Base(model=str(tiny_llama), compute_dtype="float32")
    plain = logits(load_base(base).eval())
    spec = LoraSpec(rank=4, targets="all-linear", dtype=torch.float32)
    wanted = logits(trained(load_base(base), spec))
    torch.manual_seed(0)
    exact = trained(load_base(base), spec)
    wanted = logits(exact)
    twin = trained(load_base(base), spec)
    for theirs, ours in zip(
        trainable_parameters(twin).values(), trainable_parameters(exact).values(), strict=True
    ):
        theirs.data.copy_(ours.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(exact)
    assert {type(m) for n, m in exact.named_modules() if n.endswith("_proj")} == {nn.Linear}
    effect = (wanted - plain).norm()
    assert (logits(exact) - wanted).norm() < 1e-4 * effect
    with pytest.warns(
        UserWarning, match=r"rounding changed the merged weights by .*% of the adapter's update"
    ):
        merge_adapter(twin, quantize=True)
    assert {type(m) for n, m in twin.named_modules() if n.endswith("_proj")} == {nf4.NF4Linear}
    assert (logits(twin) - wanted).norm() < effect
    assert not any(p.requires_grad for p in twin.parameters())


def test_gpt2_s_transposed_layers_stay_transposed() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    plain = logits(model.eval())
    trained(model, LoraSpec(rank=2, targets="all-linear", dtype=torch.float32))
    wanted = logits(model)
    merge_adapter(model)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert (logits(model) - wanted).norm() < 1e-4 * (wanted - plain).norm()


def test_a_tied_embedding_is_untied_so_that_the_saved_model_is_the_merged_one(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    head = model.lm_head.weight.detach().clone()
    trained(model, LoraSpec(rank=2, targets=["embed_tokens"], dtype=torch.float32), size=0.5)
    wanted = logits(model)
    merge_adapter(model)
    assert torch.equal(model.lm_head.weight, head)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert model.config.tie_word_embeddings is False  # a reader of the files would tie the head otherwise
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)


def test_rounding_to_bf16_is_said_when_it_matters() -> None:
    def small(size: float) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(32, 32)).bfloat16()
        return trained(network, LoraSpec(rank=2, targets=["0"]), size)

    with pytest.warns(UserWarning, match="rounding changed the merged weights by"):
        merge_adapter(small(0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(small(3.0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_bitfit_merges_into_biases(bias: bool, quantized: bool) -> None:
    linear: nn.Linear = nn.Linear(64, 8, bias=bias)
    linear = nf4.NF4Linear(nf4.quantize(linear.weight), linear.bias) if quantized else linear
    network = nn.Sequential(linear)
    METHODS["bitfit"].apply(network, Adapter(method="bitfit", targets="all-linear"), seed=0)
    network[0].bias_update.data.normal_()
    x = torch.randn(3, 64)
    wanted = network(x)
    merge_adapter(network)
    assert type(network[0]) is type(linear)
    torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_without_an_adapter_has_nothing_to_merge() -> None:
    with pytest.raises(ModelError, match="has no adapter: there is nothing to merge"):
        merge_adapter(nn.Linear(2, 2))


def test_a_shared_layer_stays_shared() -> None:
    linear = nn.Linear(4, 4)
    network = trained(nn.ModuleDict({"a": linear, "b": linear}), LoraSpec(rank=2, targets=["a"]))
    merge_adapter(network)
    assert network["a"] is network["b"]
    assert type(network["a"]) is nn.Linear
    assert network["a"] is not linear
