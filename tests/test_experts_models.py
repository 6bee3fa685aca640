"""Mixtures of experts in NF4 with LoRA on the experts: loading, PEFT's files, merging in memory, and runs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures_for_tests import config
from mixtures_for_tests import IDS, base, logits, plain, write_mixture
from peft import LoraConfig, PeftModel, get_peft_model
from runs_for_tests import killed_and_resumed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from qlora.adapter import LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.lora_experts import LoRAExperts
from qlora.adapter.merge import merge_adapter
from qlora.adapter.switch import Adapters
from qlora.errors import ModelError, UsageError
from qlora.model.checkpointing import checkpoint_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.model.precision import precision_of
from qlora.quantization import nf4
from qlora.quantization.expert_stack import expert_stacks, quantize, stacked
from qlora.recipe import Base, Recipe
from qlora.training.train import train

TENSORS = "adapter_model.safetensors"
MIXTURES = ["qwen3_moe", "gpt_oss", "mixtral", "llama4_text"]
"""one in the older layout with gate and up apart, one with biases and transposed matrices, one with old names,
one whose routing weights multiply inputs"""


SIZES = {"qwen3_moe large": {"hidden_size": 128, "num_experts": 16, "moe_intermediate_size": 192}}
"""a mixture of three million weights"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a checkpoint of a small mixture, in the layout of its published ones."""
    made: dict[str, Path] = {}

    def write(architecture: str) -> Path:
        if architecture not in made:
            name = architecture.split()[0]
            made[architecture] = write_mixture(
                tmp_path_factory.mktemp(name), name, **SIZES.get(architecture, {})
            )
        return made[architecture]

    return write


def spread(model: nn.Module) -> nn.Module:
    """Give A and B of all layers random numbers that bf16 holds."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in (layer.lora_a, layer.lora_b):
                numbers = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(numbers.bfloat16())
    return model


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_quantized_one_by_one_as_the_checkpoint_is_read(
    checkpoint: Callable[[str], Path], architecture: str
) -> None:
    folder = checkpoint(architecture)
    model, reference = base(folder), plain(folder)
    assert precision_of(model).share > 0.9
    with torch.no_grad():
        for name, module in model.named_modules():
            if nf4.is_nf4(module):
                weight = nf4.dequantize(module.weight, module.quant_state, torch.float32)
                reference.get_submodule(name).weight.copy_(weight)
        for name, stack in expert_stacks(model).items():
            parameter = reference.get_parameter(name)
            for number, matrix in enumerate(parameter):
                parameter[number] = nf4.rounded(matrix)
                values = stack.matrix(number, torch.float32)
                assert torch.equal(parameter[number], values.T if stack.transposed else values)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="Linux lists the files that a process has mapped"
)
def test_the_16_bit_checkpoint_does_not_stay_mapped(checkpoint: Callable[[str], Path]) -> None:
    model = base(checkpoint("qwen3_moe"))
    assert str(checkpoint("qwen3_moe")) not in Path("/proc/self/maps").read_text()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stack_has_the_bytes_of_its_matrices(double_quant: bool) -> None:
    matrices = torch.randn(3, 10, 52, generator=torch.Generator().manual_seed(0))  # no whole number of blocks
    packed = quantize(matrices, 64, double_quant)
    for number, matrix in enumerate(matrices):
        alone = nf4.quantize(matrix, 64, double_quant)
        assert torch.equal(packed.codes[number], alone.data.view(-1))
        assert torch.equal(packed.absmax[number], alone.quant_state.absmax)
    again = stacked([nf4.quantize(matrix, 64, double_quant) for matrix in matrices])
    assert torch.equal(again.codes, packed.codes)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
@pytest.mark.parametrize(
    "architecture", [name for name in MIXTURES if name != "llama4_text"]
)  # PEFT swaps A and B
def test_an_adapter_of_peft_comes_with_its_logits_and_goes_back(
    checkpoint: Callable[[str], Path], tmp_path: Path, architecture: str, parameters: list[str]
) -> None:
    folder = checkpoint(architecture)
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", use_rslora=True,
        target_parameters=[f"experts.{name}" for name in parameters],
        rank_pattern=dict.fromkeys(parameters, 2),
    )  # fmt: skip
    theirs = get_peft_model(plain(folder), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).bfloat16())
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(plain(folder), tmp_path / "peft", any_base=True)
    effect = (logits(theirs) - logits(plain(folder))).abs().max()
    assert effect > 0.05
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4 * effect
    assert {layer.rank for layer in LoRAExperts.of(ours).values()} == {2}
    save_adapter(ours, tmp_path / "ours")
    stored, back = load_file(tmp_path / "peft" / TENSORS), load_file(tmp_path / "ours" / TENSORS)
    assert stored.keys() == back.keys()
    assert all(torch.equal(stored[name], back[name]) for name in stored)
    again = PeftModel.from_pretrained(plain(folder), tmp_path / "ours")
    assert (logits(again) - logits(theirs)).abs().max() < 1e-4 * effect


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_adapter_on_all_layers_is_saved_loaded_and_merged(
    checkpoint: Callable[[str], Path], tmp_path: Path, quantization: str
) -> None:
    folder = checkpoint("qwen3_moe")
    model = spread(adapt(base(folder, quantization=quantization), LoraSpec(rank=8, alpha=8)))
    experts = LoRAExperts.of(model)
    assert len(experts) == 4
    assert {layer.rank for layer in experts.values()} == {4}, "two of four experts are active"
    save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    live, before = logits(model), logits(base(folder, quantization=quantization))
    loaded = load_adapter(base(folder, quantization=quantization), tmp_path / "ours")
    assert torch.equal(logits(loaded), live)
    merged = merge_adapter(copy.deepcopy(loaded))
    assert not lora_layers(merged)
    assert (logits(merged) - live).abs().max() < 0.01 * (live - before).abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_recomputed_experts_give_the_same_bits(
    checkpoint: Callable[[str], Path], architecture: str, dtype: str
) -> None:
    """With their layer or alone."""
    model = load_base(Base(model=str(checkpoint(architecture)), compute_dtype=dtype))
    spread(adapt(model, LoraSpec(rank=8, targets="all-linear", dropout=0.3)))
    use_fused_layers(model.train())
    found = {}
    for layers, mlps in ((0, 0), (2, 0), (1, 1), (0, 2)):
        checkpoint_layers(model, layers, mlps)
        torch.manual_seed(3)
        result = model(input_ids=IDS, use_cache=False, output_router_logits=False).logits
        (result.float() ** 2).mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found[layers, mlps] = result, gradients
        assert len(gradients) == 2 * len(lora_layers(model))
    kept, expected = found.pop((0, 0))
    for result, gradients in found.values():
        assert torch.equal(result, kept)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_a_call_beside_our_passes_reads_the_output_of_experts(checkpoint: Callable[[str], Path]) -> None:
    """A recomputation leaves it out; a call with a cache takes transformers' own layers around the same experts."""
    model = base(checkpoint("qwen3_moe"))
    spread(adapt(model, LoraSpec(rank=8, targets="all-linear")))
    expected = logits(model)
    use_fused_layers(model.train())
    checkpoint_layers(model)
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    found = model(input_ids=IDS, use_cache=True).logits
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_two_adapters_of_experts_take_turns(
    checkpoint: Callable[[str], Path], tmp_path: Path, quantization: str
) -> None:
    folder = checkpoint("qwen3_moe")
    expected = {}
    for name, rank, targets in (("first", 4, "experts"), ("second", 2, "all-linear")):
        model = spread(adapt(base(folder, quantization=quantization), LoraSpec(rank=rank, targets=targets)))
        save_adapter(model, tmp_path / name)
        expected[name] = logits(model)
    model = base(folder, quantization=quantization)
    before = logits(model)
    adapters = Adapters(model)
    for name in expected:
        adapters.load(name, tmp_path / name)
    for name in ("second", "first", "second"):
        adapters.activate(name)
        assert torch.equal(logits(model), expected[name])
    adapters.deactivate()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("targets", "linears", "experts"),
    [("all-linear", 8, 4), ("experts", 0, 4), ("attention", 8, 0), (["experts.down_proj"], 0, 2)],
)
def test_words_choose_experts(
    checkpoint: Callable[[str], Path], targets: str | list[str], linears: int, experts: int
) -> None:
    own = LoraSpec(rank=4, targets=targets, expert_rank=3 if experts else None)
    model = adapt(plain(checkpoint("qwen3_moe")), own)
    found = LoRAExperts.of(model)
    assert (len(lora_layers(model)) - len(found), len(found)) == (linears, experts)
    assert {layer.rank for layer in found.values()} <= {3}


def test_experts_need_a_mixture_and_a_whole_rank(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match='targets: "experts" matches no layer of LlamaForCausalLM'):
        adapt(plain(tiny_llama), LoraSpec(targets="experts"))
    with pytest.raises(UsageError, match="expert_rank must be at least 1"):
        LoraSpec(expert_rank=0)
    with pytest.raises(UsageError, match="expert_rank: none of the targets is a projection of experts"):
        adapt(plain(tiny_llama), LoraSpec(expert_rank=2))


def test_experts_without_an_adapter_keep_transformers_code_and_can_be_trained_as_a_whole(
    checkpoint: Callable[[str], Path],
) -> None:
    model = adapt(plain(checkpoint("qwen3_moe")), LoraSpec(targets="attention"), train_modules=["experts"])
    assert not expert_stacks(model)
    model(input_ids=IDS).logits.square().mean().backward()
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_a_part_of_adapted_experts_cannot_be_trained_as_a_whole(checkpoint: Callable[[str], Path]) -> None:
    """Our pass computes no gradient for the matrices."""
    model = base(checkpoint("qwen3_moe"), quantization="none")
    with pytest.raises(ModelError, match="is a part of experts of which another part has an adapter"):
        adapt(model, LoraSpec(rank=4, targets=["experts.down_proj"]), train_modules=["experts.gate_up_proj"])


def test_a_damaged_adapter_of_experts_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe")
    save_adapter(spread(adapt(plain(folder), LoraSpec(rank=8, targets="experts"))), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / TENSORS)
    name = next(name for name in tensors if "base_layer" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "a" / TENSORS)
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj\.lora_.\.weight is missing"):
        load_adapter(plain(folder), tmp_path / "a", any_base=True)


@pytest.fixture
def mixture_recipe(recipe_file: Callable[..., Path], checkpoint: Callable[[str], Path]) -> Recipe:
    file = recipe_file(
        base={"model": str(checkpoint("qwen3_moe"))},
        adapter={"rank": 8, "dropout": 0.1},
        training={"save_every": 2, "max_steps": 6},
        optimizer={"lr": 0.01, "schedule": "constant"},
    )
    return Recipe.load(file)


def test_a_mixture_of_millions_learns_and_its_forecast_is_right(
    mixture_recipe: Recipe, checkpoint: Callable[[str], Path]
) -> None:
    base = mixture_recipe.base.model_copy(update={"model": str(checkpoint("qwen3_moe large"))})
    result = train(mixture_recipe.model_copy(update={"base": base}), terminal=False)
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_after < result.loss_before - 0.5
    memory = json.loads((result.run / "memory.json").read_text())
    assert memory["forecast"]["total_bytes"] == pytest.approx(memory["measured"]["total_bytes"], rel=0.01)
    facts = json.loads((result.run / "facts.json").read_text())
    assert facts["base"]["parameters"] > 2.9e6
    assert facts["base"]["kept"].startswith("all "), "A and B of the experts are no weights of the base"


@pytest.mark.usefixtures("without_forecast")
def test_dropout_does_not_depend_on_the_micro_batch(mixture_recipe: Recipe, tmp_path: Path) -> None:
    losses = []
    for size in (1, 2):
        training = mixture_recipe.training.model_copy(update={"micro_batch_size": size, "max_steps": 2})
        update = {"training": training, "output": str(tmp_path / f"of {size}")}
        losses.append(train(mixture_recipe.model_copy(update=update), terminal=False).loss_after)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.usefixtures("without_forecast")
def test_a_killed_run_of_a_mixture_ends_with_the_same_adapter(
    mixture_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(mixture_recipe, terminal=False).run / "adapter" / TENSORS
    other = mixture_recipe.model_copy(update={"output": str(tmp_path / "killed")})
    resumed = killed_and_resumed(other, 3, monkeypatch) / "adapter" / TENSORS
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("active", [1, 2])
def test_routing_weights_of_the_input_are_exact(active: int) -> None:
    """Llama 4's block in fp64 against transformers' own code with the update added to the matrices."""
    torch.manual_seed(0)
    small = config("llama4_text", num_experts_per_tok=active, num_local_experts=4)
    block = Llama4TextMoe(small).double().requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, 0.3)
    reference = copy.deepcopy(block)
    adapted = adapt(nn.ModuleDict({"feed_forward": block}), LoraSpec(rank=2, targets="experts"))
    layers = LoRAExperts.of(adapted)
    assert len(layers) == 2
    updates = {}
    for name, layer in layers.items():
        for parameter in (layer.lora_a, layer.lora_b):
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
        a = layer.lora_a.view(4, layer.rank, -1)
        b = layer.lora_b.view(layer.base.out_features, layer.rank, 4)
        update = layer.scaling * torch.einsum("erj,kre->ejk", a, b)  # [E, in, out]
        leaf = name.removeprefix("feed_forward.")
        updates[leaf] = reference.get_parameter(leaf) + update
    hidden = torch.randn(2, 9, small.hidden_size, dtype=torch.float64, requires_grad=True)
    found, logits = adapted["feed_forward"](hidden)
    wanted, same = torch.func.functional_call(reference, updates, (hidden,))
    assert torch.equal(logits, same)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    trained = [hidden, *(one for layer in layers.values() for one in (layer.lora_a, layer.lora_b))]
    probe = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad((y * probe).sum(), trained) for y in (found, wanted)), strict=True
    ):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_block_whose_experts_are_put_back_runs_transformers_code(checkpoint: Callable[[str], Path]) -> None:
    model = plain(checkpoint("llama4_text"))
    before = logits(model)
    adapt(model, LoraSpec(rank=2, targets="experts"))
    blocks = [module for module in model.modules() if isinstance(module, Llama4TextMoe)]
    assert all("forward" in vars(block) for block in blocks)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    other = adapt(plain(checkpoint("llama4_text")), LoraSpec(rank=2, targets="attention"))
    assert not any("forward" in vars(module) for module in other.modules())
    assert torch.equal(logits(other), before)


def test_experts_that_return_their_input_are_exact() -> None:
    """LongCat's experts in fp64 against transformers' own code; choices 4 and 5 are identities."""
    torch.manual_seed(0)
    experts = LongcatFlashExperts(config("longcat_flash")).double().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.3)
    reference = copy.deepcopy(experts)
    adapted = adapt(nn.ModuleDict({"experts": experts}), LoraSpec(rank=2, targets="experts"))
    layers, updates = LoRAExperts.of(adapted), {}
    for name, layer in layers.items():
        for parameter in (layer.lora_a, layer.lora_b):
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
        number, leaf = layer.base.experts, name.removeprefix("experts.")
        a = layer.lora_a.view(number, layer.rank, -1)
        b = layer.lora_b.view(layer.base.out_features, layer.rank, number)
        updates[leaf] = reference.get_parameter(leaf) + layer.scaling * torch.einsum("erj,kre->ekj", a, b)
    hidden = torch.randn(9, 64, dtype=torch.float64, requires_grad=True)
    choices = torch.tensor([[n % 6, (n + 1 + n // 6) % 6] for n in range(9)])
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    found = adapted["experts"](hidden, choices, weights)
    wanted = torch.func.functional_call(reference, updates, (hidden, choices, weights))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    trained = [hidden, weights, *(one for layer in layers.values() for one in (layer.lora_a, layer.lora_b))]
    probe = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad((y * probe).sum(), trained) for y in (found, wanted)), strict=True
    ):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
