"""The layers that a target selects, in real architectures without weights, and the error if it selects none."""

from collections import Counter
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from qlora.adapter import LoraSpec, adapt, select
from qlora.adapter.targets import left_out
from qlora.errors import UsageError
from qlora.model.prepare import left_out_notes

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {**SMALL, "intermediate_size": 128}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}


def causal(kind: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def other(model: type, config: Any) -> nn.Module:
    with torch.device("meta"):
        return model(config)


def leaves(names: list[str]) -> dict[str, int]:
    return dict(Counter(name.rpartition(".")[2] for name in names))


ATTENTION = [
    ("llama", LLAMA, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
    ("mistral", LLAMA, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
    ("qwen3", LLAMA, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
    ("gemma2", LLAMA, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
    ("phi3", {**LLAMA, "pad_token_id": 0}, {"qkv_proj": 2, "o_proj": 2}),
    ("phi", LLAMA, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "dense": 2}),
    ("gpt_neox", LLAMA, {"query_key_value": 2, "dense": 2}),
    ("falcon", SMALL, {"query_key_value": 2, "dense": 2}),
    ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, {"query_key_value": 2, "dense": 2}),
    ("opt", {**SMALL, "ffn_dim": 128}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "out_proj": 2}),
    (
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        {"q_proj": 2, "k_proj": 2, "v_proj": 2, "out_proj": 2},
    ),
    ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}, {"Wqkv": 2, "out_proj": 2}),
    ("mixtral", {**LLAMA, **EXPERTS}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), ATTENTION, ids=[kind for kind, *_ in ATTENTION])
def test_attention_selects_its_projections_in_every_architecture(
    kind: str, settings: dict[str, Any], expected: dict[str, int]
) -> None:
    assert leaves(select(causal(kind, **settings), "attention")) == expected


def test_attention_of_encoders_and_vision_models_is_found_too() -> None:
    config: dict[str, Any] = {**LLAMA, "image_size": 32, "patch_size": 16}
    bert = select(other(BertModel, BertConfig(**LLAMA)), "attention")
    assert leaves(bert) == {"query": 2, "key": 2, "value": 2, "dense": 2}
    assert all("attention" in name for name in bert), "output.dense of the feed-forward is not attention"
    t5 = T5Config(d_model=64, num_layers=2, num_heads=4, d_ff=128)
    assert leaves(select(other(T5EncoderModel, t5), "attention")) == {"q": 2, "k": 2, "v": 2, "o": 2}
    vit = select(other(ViTModel, ViTConfig(**config)), "attention")
    assert len(vit) == 2 * 4
    assert all("attention" in name for name in vit)


def test_all_linear_omits_the_output_head() -> None:
    llama = causal("llama", **LLAMA)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert leaves(select(llama, "all-linear")) == dict.fromkeys(projections, 2)
    assert select(nn.ModuleDict({"inner": Headed()}), "all-linear") == ["inner.body"]
    assert select(nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)}), "all-linear") == [
        "body"
    ]
    assert "embed_out" not in leaves(select(causal("gpt_neox", **LLAMA), "all-linear"))
    assert select(llama, "all-linear") == [
        name for name in dict(llama.named_modules()) if name.endswith("_proj")
    ]


class Headed(nn.Module):
    """A network that reports its output head, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.predictions = nn.Linear(8, 8), nn.Linear(8, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.predictions


class Routed(nn.Module):
    """A mixture of experts, built as in architectures that use plain linears."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.shared_expert_gate = nn.Linear(8, 1)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])


def test_all_linear_omits_routers_but_not_other_gates() -> None:
    assert select(nn.ModuleDict({"mlp": Routed()}), "all-linear") == ["mlp.experts.0.0", "mlp.experts.1.0"]
    assert select(nn.ModuleDict({"gate": nn.Linear(8, 8)}), "all-linear") == ["gate"]
    for kind in ("mixtral", "qwen3_moe"):
        model = causal(kind, **LLAMA, **EXPERTS, moe_intermediate_size=32)
        assert not [name for name in select(model, "all-linear") if name.endswith(("gate", "router"))]


def test_a_list_can_name_routers_that_are_linear_layers_and_no_others() -> None:
    attention, experts = {"kv_n_heads": 2, "rope_theta": 1e4}, {"hidden_size": 64, "ffn_hidden_size": 32}
    dbrx = causal("dbrx", d_model=64, n_heads=4, n_layers=2, attn_config=attention, ffn_config=experts)
    assert leaves(select(dbrx, ["router.layer"])) == {"layer": 2}
    with pytest.raises(UsageError, match=r'"router" matches 2 DbrxRouter, but no layer .*layer \(2\)'):
        select(dbrx, ["router"])
    for kind, router, gate in (
        ("mixtral", "MixtralTopKRouter", "gate"),
        ("phimoe", "PhimoeTopKRouter", "router"),
    ):
        with pytest.raises(UsageError) as error:
            select(causal(kind, **LLAMA, **EXPERTS), ["q_proj", gate])
        assert str(error.value) == (
            f'targets: "{gate}": the code of {router} reads its own weight, so model.layers.0.mlp.{gate}, '
            f"model.layers.1.mlp.{gate} cannot get an adapter. Leave this entry out; train_modules=[{gate}] trains "
            "these routers as a whole"
        )


def test_routers_that_a_list_matches_beside_linear_layers_are_named() -> None:
    model = causal("qwen3_moe", **{**LLAMA, **EXPERTS, "moe_intermediate_size": 32, "mlp_only_layers": [1]})
    entry = r".*mlp\..*gate.*"
    adapt(model, LoraSpec(targets=[entry, "q_proj"]))
    assert left_out(model, [entry, "q_proj"]) == ["model.layers.0.mlp.gate"]
    assert not left_out(model, ["q_proj"])
    assert not left_out(model, "all-linear"), "the word leaves routers out"
    (note,) = left_out_notes(model, [entry, "q_proj"])
    assert note.startswith("no adapter on model.layers.0.mlp.gate, which adapter.targets match")
    model = nn.ModuleDict({"mlp": Routed()})
    assert not left_out(adapt(model, LoraSpec(targets=[".*gate"])), [".*gate"]), (
        "linear routers get an adapter"
    )


def test_routers_beside_no_module_of_experts_are_left_out_of_all_linear() -> None:
    doge = causal("doge", **LLAMA, is_moe=True, num_experts=16, num_experts_per_tok=2)
    assert "router_gate" not in leaves(select(doge, "all-linear"))
    assert leaves(select(doge, ["router_gate"])) == {"router_gate": 2}


def test_a_list_holds_names_their_last_parts_and_regular_expressions() -> None:
    llama = causal("llama", **LLAMA)
    assert leaves(select(llama, ["q_proj", "v_proj"])) == {"q_proj": 2, "v_proj": 2}
    assert select(llama, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert leaves(select(llama, ["mlp.up_proj"])) == {"up_proj": 2}
    assert select(llama, [r".*\.0\..*(q|v)_proj"]) == [f"model.layers.0.self_attn.{x}_proj" for x in "qv"]
    assert select(llama, "lm_head") == ["lm_head"], "the head can be selected by name"


def test_layers_come_in_the_models_order_and_only_once() -> None:
    llama = causal("llama", **LLAMA)
    chosen = select(llama, ["v_proj", "q_proj", ".*q_proj"])
    assert chosen == [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]


def test_the_error_for_a_target_without_a_match_lists_the_layers() -> None:
    llama = causal("llama", **LLAMA)
    with pytest.raises(UsageError) as error:
        select(llama, ["q_proj", "query"])
    assert str(error.value) == (
        'targets: "query" matches nothing in LlamaForCausalLM. Its linear layers: q_proj (2), k_proj (2), '
        "v_proj (2), o_proj (2), gate_proj (2), up_proj (2), down_proj (2), lm_head (1)."
    )
    with pytest.raises(
        UsageError, match='"embed_tokens" matches 1 Embedding, but no layer that the method adapts'
    ):
        select(llama, ["embed_tokens"])
    with pytest.raises(UsageError, match="the list is empty"):
        select(llama, [])
    with pytest.raises(UsageError, match="is not a valid regular expression"):
        select(llama, ["q_proj("])
    with pytest.raises(UsageError, match=r'"attention" matches no layer of Sequential.*: 0 \(1\)'):
        adapt(nn.Sequential(nn.Linear(4, 4)), LoraSpec(targets="attention"))


def test_gpt2_s_conv1d_are_linear_layers() -> None:
    gpt2 = causal("gpt2", n_embd=64, n_layer=2, n_head=4)
    attention = select(gpt2, "attention")
    assert leaves(attention) == {"c_attn": 2, "c_proj": 2}
    assert all("attn" in name for name in attention), "the c_proj of the feed-forward is not attention"
    assert leaves(select(gpt2, "all-linear")) == {"c_attn": 2, "c_proj": 4, "c_fc": 2}
    with pytest.raises(UsageError, match=r"c_attn \(2\), c_proj \(4\), c_fc \(2\), lm_head \(1\)"):
        select(gpt2, ["q_proj"])


class Scaled(nn.Linear):
    """A subclass that computes more than the product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_only_plain_products_are_linear_layers() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64),
            "packed": bnb.nn.Linear4bit(64, 64),
            "scaled": Scaled(64, 64),
            "attention": nn.MultiheadAttention(64, 2),
        }
    )
    assert select(model, "all-linear") == ["plain", "packed"]
    with pytest.raises(UsageError, match="matches 1 Scaled, but no layer that the method adapts"):
        select(model, ["scaled"])
