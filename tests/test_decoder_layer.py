"""Our decoder layer, by each of its specs, against transformers': same numbers, fewer tensors saved, fewer products."""

import copy
import inspect
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.lora import adapt, lora_layers
from qlora.data import Batch
from qlora.errors import RecipeError
from qlora.memory.live import LiveBytes
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.decoder_layer import FusedLayer, Recompute, use_fused_layers
from qlora.model.layer_specs import LAYER_SPECS
from qlora.model.prepare import layer_notes
from qlora.model.varlen_attention import read_documents, use_capped_attention
from qlora.objective.causal_lm import loss_sum
from qlora.objective.step import accumulate
from qlora.ops import dropout as dropout_module
from qlora.ops import mlp as mlp_module
from qlora.ops.rms_norm import rms_norm

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, RANK = 64, 160, 4, 2, 4
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": 90,
}
PADDING = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""special tokens within the vocabulary, where the default ones are not"""
WINDOWS = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        tie_word_embeddings=False,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "olmo2": Olmo2Config(**SIZES, initializer_range=0.1),
    "gemma2": Gemma2Config(
        **SIZES,
        tie_word_embeddings=False,
        sliding_window=7,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=0.1,  # so low that it matters
    ),
    "gemma": GemmaConfig(**SIZES, tie_word_embeddings=False),
    "ministral": MinistralConfig(**SIZES, **WINDOWS),
    "phi3": Phi3Config(**SIZES | PADDING, sliding_window=7, partial_rotary_factor=0.5),
    "granite": GraniteConfig(**SIZES, residual_multiplier=0.4, attention_multiplier=0.2),
    "smollm3": SmolLM3Config(**SIZES | PADDING, no_rope_layers=[1, 0, 1], use_sliding_window=True, **WINDOWS),
    "olmo3": Olmo3Config(**SIZES, **WINDOWS, initializer_range=0.2),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        **EXPERTS,
        mlp_only_layers=[1],
        initializer_range=0.05,
        use_sliding_window=True,
        sliding_window=7,
        tie_word_embeddings=False,
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
    "glm": GlmConfig(**SIZES | PADDING, attention_bias=True),
    "glm4": Glm4Config(**SIZES | PADDING),
    "cohere2": Cohere2Config(**SIZES | PADDING, **WINDOWS, tie_word_embeddings=False),
}
FIRST = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "olmo2")
"""families that the default tests try in every variant; others take part in the first variants of some tests"""
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""transformers' argument for the keys and values of earlier tokens, renamed in 5.24"""


def families(*variants: tuple[Any, ...], others: int = 1) -> list[Any]:
    """Return the cases of a test: every family with every variant of the other arguments.

    `others` is the number of variants that the default tests try with a family that is not one of the first.
    """
    return [
        pytest.param(
            config,
            *variant,
            id="-".join((name, *map(str, variant))),
            marks=() if name in FIRST or number < others else pytest.mark.slow,
        )
        for name, config in CONFIGS.items()
        for number, variant in enumerate(variants)
    ]


def model_of(config: PretrainedConfig, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Return an adapted model whose norms, biases and B differ from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)
    use_capped_attention(model)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # transformers' grouped products know no float64
    adapt(model, LoraSpec(**{"rank": RANK, "targets": "all-linear", "dtype": dtype} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("lora_b"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.train()


def batch_of(rows: int = 2, length: int = 12) -> Batch:
    ids = torch.arange(rows * length).view(rows, length) * 7 % 90
    return Batch(ids, ids.clone(), None, tokens=rows * length, supervised=rows * (length - 1))


def pass_over(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = accumulate(model, [batch], seed=3, step=0).sum
    return loss, {name: p.grad for name, p in trainable_parameters(model).items()}


def test_every_architecture_with_our_layers_is_tested_here() -> None:
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(copy.deepcopy(config)) for config in CONFIGS.values()]
    layers = {type(model.model.layers[0]).__name__ for model in models}
    assert layers == set(LAYER_SPECS)


@pytest.mark.parametrize(
    ("config", "targets", "documents"),
    families(
        ("all-linear", ((7, 5), (9, 3))),
        ("all-linear", None),
        (["q_proj", "v_proj"], None),
        (["down_proj"], None),
    ),
)
def test_losses_and_gradients_are_those_of_transformers(
    config: PretrainedConfig, targets: Any, documents: tuple[tuple[int, ...], ...] | None
) -> None:
    if isinstance(targets, list):
        found = {name.rpartition(".")[2] for name, _ in model_of(config).named_modules()}
        targets = [name for name in targets if name in found] or [
            "qkv_proj" if "qkv_proj" in found else "o_proj"
        ]
    model, batch = model_of(config, targets=targets), replace(batch_of(), documents=documents)
    read_documents(model)
    loss, grads = pass_over(model, batch)
    ours = use_fused_layers(copy.deepcopy(model))
    for layer in decoder_layers(ours):
        assert isinstance(layer, FusedLayer)
        layer.original.forward = None  # a call to it fails
    our_loss, our_grads = pass_over(ours, batch)
    # transformers normalises in fp32
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert grad.any()
        assert (our_grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def pass_with_choices(model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the gradients, and the experts that each router chooses."""
    chosen: list[Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    hooks = [
        router.register_forward_hook(lambda _, inputs, output: chosen.append(output[-1]))
        for router in routers
    ]
    _, gradients = pass_over(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(chosen) == len(routers)
    return gradients, chosen


@pytest.mark.parametrize(("config", "dtype"), families((torch.bfloat16,), (torch.float32,), others=0))
def test_in_low_precision_it_is_as_close_to_fp64_as_transformers(
    config: PretrainedConfig, dtype: torch.dtype
) -> None:
    exact = model_of(config)
    rounded = copy.deepcopy(exact).to(dtype)
    models = [exact, rounded, use_fused_layers(copy.deepcopy(rounded))]
    for length in range(12, 5, -1):
        passes = [pass_with_choices(model, batch_of(length=length)) for model in models]
        choices = [found for _, found in passes]
        if all(map(torch.equal, choices[0] * 2, choices[1] + choices[2])):
            break  # in other batches a rounding sends a token to another expert
    else:
        pytest.fail("no batch in which all tokens go to the same experts")
    expected, theirs, ours = (gradients for gradients, _ in passes)

    def error(found: dict[str, Tensor]) -> float:
        return sum((found[n].double() - expected[n]).square().sum().item() for n in expected) ** 0.5

    assert 0 < error(ours) <= 1.5 * error(theirs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_norms_are_those_of_transformers_to_the_bit(config: PretrainedConfig) -> None:
    """Epsilon, offset and rounding are right, which a loss would hardly show."""
    layer = use_fused_layers(model_of(config, torch.bfloat16)).model.layers[0]
    norms = [module for name, module in layer.named_modules() if name.endswith("norm")]
    assert norms
    for norm in norms:
        x = torch.randn(40, len(norm.weight), dtype=torch.bfloat16) / 256
        assert torch.equal(rms_norm(x, layer.spec.norm(norm)), norm(x))


@pytest.mark.parametrize(
    ("config", "dropout", "layers", "mlps"),
    families((0.3, 1, 1), (0.3, 3, 0), (0.3, 0, 3), (0.0, 1, 1), (0.0, 3, 0), (0.0, 0, 3)),
)
def test_recomputed_layers_give_the_same_bits(
    config: PretrainedConfig, dropout: float, layers: int, mlps: int
) -> None:
    model = use_fused_layers(model_of(config, torch.float32, dropout=dropout))
    loss, grads = pass_over(model, batch_of())
    if not all(layer.mlp_alone for layer in decoder_layers(model)[layers:]):  # experts
        layers, mlps = layers + mlps, 0
    checkpoint_layers(model, layers, mlps)
    for _ in range(2):
        again, recomputed = pass_over(model, batch_of())
        assert torch.equal(loss, again)
        assert all(torch.equal(recomputed[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("layers", "mlps"), [(3, 0), (0, 3)])
def test_a_long_row_goes_through_the_mlp_in_pieces(
    dropout: float, layers: int, mlps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long row gives the same result in pieces, with any recompute, and with wide tensors of one piece at a time."""
    model = use_fused_layers(model_of(CONFIGS["llama"], dropout=dropout))
    batch = batch_of(rows=2, length=60)

    def most_live() -> int:
        with LiveBytes() as live:
            pass_over(model, batch)
        return live.trace().phases()["backward"]

    checkpoint_layers(model, layers, mlps)
    whole = most_live()
    for module in (dropout_module, mlp_module):
        monkeypatch.setattr(module, "PIECE", 16)  # the last piece of the 120 tokens has 8
    assert most_live() < whole - 104 * INTERMEDIATE * 8
    in_pieces, grads = pass_over(model, batch)
    checkpoint_layers(model, 0, 0)
    kept, expected = pass_over(model, batch)
    torch.testing.assert_close(in_pieces, kept, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_dropout_is_drawn_as_often_as_in_transformers_layers() -> None:
    model = model_of(CONFIGS["llama"], dropout=0.4)
    theirs = pass_over(model, batch_of())
    ours = pass_over(use_fused_layers(model), batch_of())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)


def test_a_recompute_skips_the_last_product() -> None:
    model = use_fused_layers(model_of(CONFIGS["llama"], torch.bfloat16))
    batch = batch_of()

    def operations() -> int:
        loss = loss_sum(model, batch)
        with FlopCounterMode(display=False) as counted:
            loss.backward()
        return counted.get_total_flops()

    layer = decoder_layers(model)[0]
    assert isinstance(layer, FusedLayer)
    kept = operations()
    checkpoint_layers(model)
    extra = (operations() - kept) / (2 * batch.tokens * 3)  # per token and layer
    down = HIDDEN * INTERMEDIATE
    key = HIDDEN // HEADS * KEY_HEADS
    products = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * key + 2 * down  # q, o, k, v, gate, up
    ranks = RANK * (4 * HIDDEN + 3 * HIDDEN + INTERMEDIATE)  # x A^T, also of o and down
    ranks += RANK * (2 * HIDDEN + 2 * key + 2 * INTERMEDIATE)  # (x A^T) B^T, without down
    attention = 2 * 12 * HIDDEN
    assert extra <= products + ranks + attention
    assert extra < products + down
    assert layer.repeated(Recompute.ALL) == products / (products + down)

    checkpoint_layers(model, 0, 3)
    extra = (operations() - kept) / (2 * batch.tokens * 3)
    ranks = RANK * (2 * HIDDEN + INTERMEDIATE) + RANK * 2 * INTERMEDIATE
    assert 2 * down < extra <= 2 * down + ranks
    assert layer.repeated(Recompute.MLP) == 2 * down / (products + down)


def test_with_a_norm_after_the_mlp_a_recompute_repeats_the_last_product() -> None:
    layer = decoder_layers(use_fused_layers(model_of(CONFIGS["llama"])))[0]
    assert isinstance(layer, FusedLayer)
    layer.spec = replace(layer.spec, after_mlp="post_attention_layernorm")
    wide = HIDDEN * INTERMEDIATE
    assert layer.repeated(Recompute.ALL) == 1
    assert layer.repeated(Recompute.MLP) == 3 * wide / (3 * wide + 2 * HIDDEN * (HIDDEN + HIDDEN // 2))


def test_only_the_minimal_set_is_saved() -> None:
    model = model_of(CONFIGS["llama"], torch.bfloat16)
    batch = batch_of(rows=2, length=64)
    parameters = {p.data_ptr() for p in model.parameters()}

    def kept() -> int:
        """Return the bytes of the storages that a forward pass saves for the backward."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[Tensor] = []
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model.layers[1](hidden, position_embeddings=positions)
        return sum(storages.values())

    hidden = torch.randn(2, 64, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(64)[None])
    key = HIDDEN // HEADS * KEY_HEADS
    values = (
        HIDDEN + (HIDDEN + 2 * key) + HIDDEN + HIDDEN + 2 * INTERMEDIATE
    )  # in, q k v, attended, middle, gate up
    ranks = 7 * RANK
    expected = batch.tokens * (2 * (values + ranks) + 4 * HEADS)  # attention's log-sum-exp is fp32
    cos_and_sin = 2 * positions[0].nbytes
    theirs = kept()
    use_fused_layers(model)
    assert theirs > 1.7 * kept(), "compared with transformers' layer around the same linears"
    assert kept() == pytest.approx(expected + cos_and_sin, rel=0.02)
    model.model.layers[1].recompute = Recompute.MLP
    mlp = batch.tokens * 2 * (2 * INTERMEDIATE + 3 * RANK)
    assert kept() == pytest.approx(expected - mlp + cos_and_sin, rel=0.02)
    model.model.layers[1].recompute = Recompute.ALL
    assert kept() <= hidden.nbytes + cos_and_sin + 16384  # plus the random state


def test_parameter_names_stay() -> None:
    model = model_of(CONFIGS["qwen3"], torch.float32)
    names = list(model.state_dict())
    use_fused_layers(model)
    assert list(model.state_dict()) == names
    assert len(lora_layers(model)) == 21


def talkative(config: PretrainedConfig) -> nn.Module:
    """Return a model with large matrices, so that its next token depends on the earlier ones."""
    model = model_of(config, torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def continuation(model: nn.Module, **settings: Any) -> list[int]:
    """Return twelve tokens after a prompt of ten tokens, which is longer than Mistral's window here."""
    ids = torch.arange(10)[None] * 7
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **settings)[0].tolist()


@pytest.mark.parametrize("config", families((), others=0))
def test_tokens_are_generated_as_without_our_layers(config: PretrainedConfig) -> None:
    """The cache works under any name that transformers gives it: a renamed cache argument was once lost."""
    model = talkative(config)
    expected = continuation(model)
    assert len(set(expected[10:])) > 3
    use_fused_layers(model)
    assert all(isinstance(layer, FusedLayer) for layer in decoder_layers(model))
    assert continuation(model) == expected
    assert continuation(model.train()) == expected, "a model in training mode generates too"
    assert continuation(model, use_cache=False) == expected


@pytest.mark.parametrize("config", families((), others=0))
def test_a_cache_sees_every_token_in_every_layer(config: PretrainedConfig) -> None:
    model = use_fused_layers(talkative(config))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for ids in (torch.arange(5)[None], torch.tensor([[7]])):
            model(ids, use_cache=True, **{CACHE: cache})
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 6, 6]


@pytest.mark.parametrize(("config", "documents"), families((((7, 5), (9, 3)),), (None,), others=0))
def test_a_training_step_calls_the_layers_with_nothing_they_do_not_know(
    config: PretrainedConfig, documents: tuple[tuple[int, ...], ...] | None
) -> None:
    """Our layers know every keyword that transformers passes in training; a new or renamed one fails here."""
    model = use_fused_layers(model_of(config, torch.float32))
    read_documents(model)
    for layer in decoder_layers(model):
        layer.original.forward = None  # a call to it fails
    loss, _ = pass_over(model, replace(batch_of(), documents=documents))
    assert loss.isfinite()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keyword", ["cache", "past_key_values", "renamed_again", "use_cache"])
def test_a_keyword_that_is_not_known_goes_to_the_layer_of_transformers(keyword: str, training: bool) -> None:
    """The original layer gets every other argument of the call too."""
    model = use_fused_layers(model_of(CONFIGS["llama"], torch.float32)).train(training)
    layer, calls = decoder_layers(model)[1], []
    assert isinstance(layer, FusedLayer)
    hidden, value = torch.randn(1, 4, HIDDEN), object()
    call = {"position_embeddings": (torch.ones(1), torch.zeros(1)), "attention_mask": None, keyword: value}

    def original(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return hidden

    object.__setattr__(layer, "original", original)
    assert layer(hidden, **call) is hidden
    assert calls == [((hidden,), call)]


def test_layers_with_another_computation_are_not_replaced() -> None:
    for change in ({"hidden_act": "gelu"}, {"num_hidden_layers": 1, "hidden_act": "relu"}):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | change)).requires_grad_(False)
        assert not any(isinstance(layer, FusedLayer) for layer in decoder_layers(use_fused_layers(model)))
    for name, value in (("is_causal", False), ("attn_logit_softcapping", 50.0)):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).requires_grad_(False)
        setattr(model.model.layers[1].self_attn, name, value)
        layers = decoder_layers(use_fused_layers(model))
        assert [isinstance(layer, FusedLayer) for layer in layers] == [True, False, True]
    trained = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    assert not any(isinstance(layer, FusedLayer) for layer in decoder_layers(use_fused_layers(trained)))


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (LlamaConfig(**SIZES), None),
        (CONFIGS["mixtral"], None),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "the layers of .*: their activation is GELUActivation"),
        (
            Phi3Config(**SIZES | PADDING, resid_pdrop=0.1),
            "the layers of .*: their config.json asks for dropout",
        ),
        (
            GPTNeoXConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=90),
            "no fused layers",
        ),
    ],
    ids=["llama", "mixtral", "activation", "dropout", "gpt_neox"],
)
def test_layers_that_no_spec_describes_are_named_at_the_start_of_a_run(
    config: PretrainedConfig, note: str | None
) -> None:
    model = AutoModelForCausalLM.from_config(config)
    adapt(model, LoraSpec(targets="all-linear"))
    notes = layer_notes(use_fused_layers(model))
    assert [
        bool(re.search(f"the decoder layers run transformers' own code.*{note}", one)) for one in notes
    ] == ([] if note is None else [True])


def test_layers_of_which_some_are_described_are_counted() -> None:
    model = model_of(CONFIGS["llama"])
    decoder_layers(model)[1].self_attn.is_causal = False
    (note,) = layer_notes(use_fused_layers(model))
    assert note.startswith("1 of 3 decoder layers run")
    assert note.endswith("their attention is not causal")


def test_experts_keep_their_own_code_and_can_be_trained_in_any_way() -> None:
    model = model_of(CONFIGS["qwen3_moe"], targets=["q_proj"])
    layers = decoder_layers(model)
    layers[0].mlp.gate.weight.requires_grad_()
    layers[1].mlp.up_proj.weight.requires_grad_()  # of the gated MLP, which our passes compute
    use_fused_layers(model)
    experts, gated, _ = decoder_layers(model)
    assert isinstance(experts, FusedLayer)
    assert not isinstance(gated, FusedLayer)
    with pytest.raises(
        RecipeError,
        match=r"the experts of Qwen3MoeForCausalLM have no pass of ours, so its MLPs",
    ):
        checkpoint_layers(model, 0, 1)


def test_experts_may_return_the_logits_of_their_router_too() -> None:
    model = use_fused_layers(model_of(CONFIGS["mixtral"]))
    loss, _ = pass_over(model, batch_of())
    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(lambda module, arguments, output: (output, torch.zeros(1)))
    assert torch.equal(pass_over(model, batch_of())[0], loss)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_less_is_saved_than_in_the_layers_of_transformers(config: PretrainedConfig) -> None:
    """Experts save the same in both, so a mixture of experts gains less."""
    model = model_of(config, torch.bfloat16)
    parameters = {p.data_ptr() for p in model.parameters()}

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_sum(model, batch_of(rows=2, length=64))
        assert loss.requires_grad  # the graph keeps the tensors, so that no two have the same address
        return sum(storages.values())

    theirs = kept()
    use_fused_layers(model)
    assert theirs > (1.05 if hasattr(config, "num_experts_per_tok") else 1.5) * kept()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("layers", "mlps"), [(0, 0), (0, 3), (3, 0)])
def test_a_step_on_a_gpu_is_the_same_with_kernels_and_without(
    layers: int, mlps: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = use_fused_layers(model_of(CONFIGS["qwen3"], torch.bfloat16, dropout=0.2)).to(device)
    checkpoint_layers(model, layers, mlps)
    loss, grads = pass_over(model, batch_of())
    monkeypatch.setenv("QLORA_KERNELS", "off")
    plain_loss, plain = pass_over(model, batch_of())
    torch.testing.assert_close(loss, plain_loss, rtol=1e-2, atol=0)
    for name, grad in grads.items():
        off = (grad - plain[name]).float().norm() / plain[name].float().norm()
        assert off < 0.05, name
