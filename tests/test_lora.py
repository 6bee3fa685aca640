"""LoRA layers: the invariants of the method, one a test, on a small Llama in NF4, and other networks."""

import math
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedModel

from qlora.adapter import LoRALinear, LoraSpec, adapt, lora_layers, save_adapter, trainable_parameters
from qlora.errors import ModelError, UsageError
from qlora.quantization import nf4

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def to_nf4(model: nn.Module) -> nn.Module:
    """Make every linear of the decoder layers bitsandbytes' own Linear4bit, as transformers loads it."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "layers" in name:
            plain = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            plain.weight = nf4.quantize(linear.weight)
            plain.quant_state = plain.weight.quant_state
            plain.support_avx512bf16_for_cpu = True  # makes its own forward repack the weight in eval mode
            model.set_submodule(name, plain)
    return model


@pytest.fixture
def base(tiny_llama: Path) -> PreTrainedModel:
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return to_nf4(model).train()


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(seed), labels=ids(seed)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    for step in range(steps):
        gradients(model, step)
        optimizer.step()


def fingerprint(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the base: parameters, buffers, and the statistics of the 4-bit weights."""
    state = {name: t.clone() for name, t in model.state_dict().items() if ".lora_" not in name}
    assert any("absmax" in name for name in state)
    return {name.replace(".base.", "."): t for name, t in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_step_0_the_output_equals_the_base_exactly(base: PreTrainedModel, dtype: torch.dtype) -> None:
    nf4.use_nf4_linears(base.to(dtype))
    expected = base(input_ids=ids()).logits
    for name, tensor in base.named_parameters():
        assert tensor.dtype in (dtype, torch.uint8), name
    adapt(base, LoraSpec(targets="all-linear", rank=4, dropout=0.1))
    assert torch.equal(base(input_ids=ids()).logits, expected)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_at_step_0_one_layer_equals_its_base_exactly(quantized: bool, biased: bool) -> None:
    linear = nn.Linear(45, 33, bias=biased)
    layer: nn.Module = nf4.NF4Linear(nf4.quantize(linear.weight), linear.bias) if quantized else linear
    for x in (torch.randn(45), torch.randn(3, 45), torch.randn(2, 3, 45), torch.randn(45, 7).T):
        assert torch.equal(LoRALinear(layer)(x), layer(x))


def test_only_the_adapters_train(base: PreTrainedModel) -> None:
    adapt(base, LoraSpec(targets="all-linear", rank=4))
    adapters = {f"{name}.{which}" for name in lora_layers(base) for which in ("lora_a", "lora_b")}
    assert len(adapters) == 2 * 7 * 2
    assert set(trainable_parameters(base)) == adapters
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    train(base, 3)
    changed = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    assert changed == adapters


def test_the_bytes_of_the_base_do_not_change_in_training(base: PreTrainedModel) -> None:
    before = fingerprint(base)
    adapt(base, LoraSpec(targets="attention", rank=4))
    train(base, 3)
    base.eval()
    with torch.no_grad():
        base(input_ids=ids())
    assert same(fingerprint(base), before)


def test_evaluation_between_training_steps_changes_no_gradient(base: PreTrainedModel) -> None:
    """bitsandbytes' own forward would silently cut the base out of every later gradient once it ran in eval mode."""
    adapt(base, LoraSpec(targets=["q_proj", "down_proj"], rank=4))
    train(base, 1)
    before = gradients(base, seed=5)
    assert len(before) == 2 * 2 * 2
    base.eval()
    with torch.no_grad():
        base(input_ids=ids(9))
    base.train()
    assert same(gradients(base, seed=5), before)


def test_no_code_path_calls_the_forward_of_bitsandbytes(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("bitsandbytes' Linear4bit.forward was called")

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", refuse)
    with pytest.raises(AssertionError, match="was called"):
        base(input_ids=ids())
    adapt(base, LoraSpec(targets=["q_proj"], rank=4))  # the other linears stay plain 4-bit linears
    train(base, 1)
    base.eval()
    base.generate(ids()[:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
    save_adapter(base, tmp_path)


@pytest.mark.parametrize("shape", [(64, 64), (33, 45), (7, 160), (100, 96)])
def test_a_layer_agrees_with_fp64_over_the_dequantized_weight(shape: tuple[int, int]) -> None:
    weight = nf4.quantize(torch.randn(shape))
    layer = LoRALinear(
        nf4.NF4Linear(weight, torch.randn(shape[0])), LoraSpec(rank=3, alpha=6, dtype=torch.float32)
    )
    nn.init.normal_(layer.lora_b)
    x = torch.randn(5, shape[1], requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    w = nf4.dequantize(weight, weight.quant_state, torch.float64)
    x64, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b))
    expected = x64 @ w.T + layer.base.bias.double() + 2 * x64 @ a.T @ b.T
    expected.square().sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for found, wanted in ((x, x64), (layer.lora_a, a), (layer.lora_b, b)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-3)


def test_checkpointing_a_model_with_dropout_changes_no_bit(base: PreTrainedModel) -> None:
    adapt(base, LoraSpec(targets="all-linear", rank=4, dropout=0.3))
    train(base, 1)
    torch.manual_seed(3)
    expected = gradients(base)
    for layer in base.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda *args, **kwargs: checkpoint(
            *args, **kwargs, use_reentrant=False
        )
    torch.manual_seed(3)
    assert same(gradients(base), expected)
    torch.manual_seed(4)
    assert not same(gradients(base), expected), "dropout must draw another mask for another seed"


@pytest.mark.parametrize(
    ("scaling", "expected"), [("alpha/rank", 2.0), ("alpha/sqrt(rank)", 4.0), ("alpha", 8.0)]
)
def test_the_update_is_scaled(scaling: str, expected: float) -> None:
    layer = LoRALinear(nn.Linear(6, 5), LoraSpec(rank=4, alpha=8, scaling=scaling, dtype=torch.float32))
    assert layer.scaling == expected
    nn.init.ones_(layer.lora_b)
    x = torch.randn(3, 6)
    update = layer(x) - layer.base(x)
    torch.testing.assert_close(update, expected * x @ (layer.lora_b @ layer.lora_a).T)
    assert LoRALinear(nn.Linear(6, 5), LoraSpec(rank=16)).scaling == 1


def test_a_is_initialised_as_in_the_documents_and_b_is_zero() -> None:
    linear = nn.Linear(1024, 512)
    kaiming = LoRALinear(linear, LoraSpec(rank=16, dtype=torch.float32))
    assert kaiming.lora_a.abs().max() <= 1 / math.sqrt(1024)
    assert kaiming.lora_a.std().item() == pytest.approx(1 / math.sqrt(3 * 1024), rel=0.03)
    gaussian = LoRALinear(linear, LoraSpec(rank=16, init="gaussian", dtype=torch.float32))
    assert gaussian.lora_a.std().item() == pytest.approx(1 / 16, rel=0.03)
    orthogonal = LoRALinear(linear, LoraSpec(rank=16, init="orthogonal", dtype=torch.float32))
    torch.testing.assert_close(orthogonal.lora_a @ orthogonal.lora_a.T, torch.eye(16))
    for layer in (kaiming, gaussian, orthogonal):
        assert layer.lora_a.shape == (16, 1024)
        assert layer.lora_b.shape == (512, 16)
        assert not layer.lora_b.any()
    assert LoRALinear(linear).lora_a.dtype == torch.bfloat16


def test_the_initial_values_depend_only_on_seed_and_name(tiny_llama: Path) -> None:
    def a(targets: str, seed: int, layer: int = 0) -> Tensor:
        torch.rand(seed + len(targets))  # the global generator must not matter
        model = adapt(LlamaForCausalLM.from_pretrained(tiny_llama), LoraSpec(targets=targets), seed=seed)
        return lora_layers(model)[f"model.layers.{layer}.self_attn.q_proj"].lora_a

    assert torch.equal(a("attention", 1), a("all-linear", 1))
    assert not torch.equal(a("attention", 1), a("attention", 2))
    assert not torch.equal(a("attention", 1, layer=0), a("attention", 1, layer=1))


def test_patterns_override_rank_and_alpha(base: PreTrainedModel) -> None:
    adapt(
        base,
        LoraSpec(
            rank=4,
            alpha=8,
            targets="attention",
            rank_pattern={"q_proj": 2, r"layers\.1\..*": 16},
            alpha_pattern={"k_proj": 32},
        ),
    )
    found = {name.removeprefix("model.layers."): (m.rank, m.alpha) for name, m in lora_layers(base).items()}
    assert found["0.self_attn.q_proj"] == found["1.self_attn.q_proj"] == (2, 8), "the first match counts"
    assert found["0.self_attn.k_proj"] == (4, 32)
    assert found["1.self_attn.k_proj"] == (16, 32)
    assert found["0.self_attn.v_proj"] == (4, 8)
    with pytest.raises(UsageError, match='"proj" matches no targeted layer'):  # only part of a name
        adapt(
            nn.ModuleDict({"q_proj": nn.Linear(2, 2)}),
            LoraSpec(targets="attention", rank_pattern={"proj": 2}),
        )


class Shared(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(0, 1), nn.LazyLinear(3)),
    "torch's encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=True
    ),
    "shared": Shared,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_with_linear_layers_can_be_adapted(name: str) -> None:
    network = NETWORKS[name]()
    x = torch.randn(3, 8, 8)
    network(x)
    expected = network.requires_grad_(False)(x)  # frozen first: torch's attention then takes another path
    adapt(network, LoraSpec(targets="all-linear", rank=2, dtype=torch.float32))
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)
    network(x).square().sum().backward()
    for layer in lora_layers(network).values():
        assert layer.lora_b.grad.any()
        nn.init.normal_(layer.lora_b)
    trained = network(x)
    assert not torch.allclose(trained, expected)
    padding = {"src_key_padding_mask": torch.zeros(3, 8, dtype=torch.bool)} if "encoder" in name else {}
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), trained)
        torch.testing.assert_close(network(x, **padding), trained)


def test_code_that_reads_the_weight_of_the_layer_gets_an_error() -> None:
    layer = LoRALinear(nn.Linear(4, 4))
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="reads `weight` instead of calling the adapted layer"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = layer.nonsense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": float("nan")}, "alpha must be above 0"),
        ({"alpha": 1e300}, "alpha must be above 0 and at most 1e"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"scaling": "rank"}, "scaling must be alpha/rank or"),
        ({"scaling": "alpha"}, "scaling alpha needs a number in alpha"),
        ({"init": "zeros"}, "init must be kaiming, gaussian, orthogonal, pissa, loftq or zero"),
        ({"rank_pattern": {"nothing": 2}}, '"nothing" matches no targeted layer'),
        ({"alpha_pattern": {"(": 2.0}}, "is not a valid regular expression"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        adapt(nn.Sequential(nn.Linear(4, 4)), LoraSpec(targets="all-linear", **arguments))


def test_layers_that_cannot_be_wrapped_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot wrap Conv1d"):
        LoRALinear(nn.Conv1d(1, 1, 1))
    model = adapt(nn.Sequential(nn.Linear(4, 4)), LoraSpec(targets="all-linear"))
    with pytest.raises(ModelError, match="has an adapter already"):
        adapt(model, LoraSpec(targets="all-linear"))
