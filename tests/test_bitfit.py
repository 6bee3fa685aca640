"""BitFit starts as the base, trains only biases, and its runs support what other runs support."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures_for_tests import config, recipe
from commands_for_tests import qlora
from test_memory_forecast import assert_right, foreseen, measured
from tokenizers_for_tests import byte_level
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora import merge_adapter
from qlora.adapter import Adapters, adapt, load_adapter, save_adapter, trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.adapter.methods.bitfit import BiasLinear, BiasSpec
from qlora.data import Prompts
from qlora.errors import ModelError, RecipeError
from qlora.memory.workload import assumed
from qlora.merging.write import MergeSource, write_merged
from qlora.model.load import load_base
from qlora.recipe import Adapter, Base, Data, Recipe

RecipeFile = Callable[..., Path]
IDS = torch.arange(24).view(2, 12) * 7
EVERY_LINEAR = Adapter(method="bitfit", targets="all-linear")


def adapted(base: Base, size: float = 0.0) -> nn.Module:
    """Return the base with BitFit on every linear; the updates have this standard deviation."""
    model = METHODS["bitfit"].apply(load_base(base), EVERY_LINEAR, seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(0, size)
    return model


def with_biases(folder: Path) -> Base:
    """Write a small Qwen 2: its q, k and v have biases, its other linears have none."""
    model = AutoModelForCausalLM.from_config(config("qwen2", num_hidden_layers=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return Base(model=str(folder), compute_dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_as_the_base_and_trains_biases_alone(tiny_llama: Path, dtype: str) -> None:
    base = Base(model=str(tiny_llama), compute_dtype=dtype)
    model = load_base(base)
    before = model(input_ids=IDS).logits
    METHODS["bitfit"].apply(model, EVERY_LINEAR, seed=0)
    assert torch.equal(model(input_ids=IDS).logits, before)
    trained = trainable_parameters(model)
    assert {name.rpartition(".")[2] for name in trained} == {"bias_update"}
    layers = BiasLinear.of(model)
    assert sum(p.numel() for p in trained.values()) == sum(layer.out_features for layer in layers.values())
    assert METHODS["bitfit"].notes(model) == [
        f"bitfit: {len(layers)} of {len(layers)} target layers have no bias in the base; they start at zero"
    ]
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())


def test_the_gradient_equals_that_of_a_bias() -> None:
    linear = nn.Linear(5, 3).double()
    layer = BiasLinear(linear, BiasSpec(torch.float64))
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    bias = linear.bias.detach().clone().requires_grad_()
    (F.linear(x, linear.weight.detach(), bias).tanh() * weights).sum().backward()
    (layer(x).tanh() * weights).sum().backward()
    assert bias.grad is not None
    assert layer.bias_update.grad is not None
    torch.testing.assert_close(layer.bias_update.grad, bias.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.merged_bias(), linear.bias.float())


def test_an_adapter_is_saved_loaded_and_switched(tiny_llama: Path, tmp_path: Path) -> None:
    base = Base(model=str(tiny_llama), compute_dtype="float32")
    model = adapted(base, 0.1)
    save_adapter(model, tmp_path / "bitfit")
    wanted = model.eval()(input_ids=IDS).logits
    assert torch.equal(
        load_adapter(load_base(base).eval(), tmp_path / "bitfit")(input_ids=IDS).logits, wanted
    )
    save_adapter(adapt(load_base(base)), tmp_path / "lora")
    adapters = Adapters(load_base(base).eval())
    plain = adapters.model(input_ids=IDS).logits
    for name in ("bitfit", "lora"):
        adapters.load(name, tmp_path / name)
    adapters.activate("bitfit")
    assert torch.equal(adapters.model(input_ids=IDS).logits, wanted)
    adapters.activate("lora")
    assert torch.equal(adapters.model(input_ids=IDS).logits, plain), "B is zero"
    with pytest.raises(ModelError, match="an adapter of another method than lora"):
        load_adapter(model, tmp_path / "lora")


def test_an_adapter_that_does_not_fit_is_refused_with_its_file(tmp_path: Path) -> None:
    two, one = (nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for names in ("ab", "a"))
    save_adapter(METHODS["bitfit"].apply(two, EVERY_LINEAR, seed=0), tmp_path)
    with pytest.raises(ModelError, match=r"_config\.json: the adapter does not fit this model: no layer b\."):
        load_adapter(one, tmp_path, any_base=True)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_trains_its_bias_and_merges_it(tmp_path: Path, bias: bool) -> None:
    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 3, 3, groups=1, bias=bias), nn.Flatten(), nn.Linear(3, 2))

    settings = Adapter(method="bitfit", targets=["0", "2"])
    model, x = METHODS["bitfit"].apply(network(), settings, seed=0), torch.randn(4, 2, 3, 3)
    assert torch.equal(model(x), network()(x))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_()
    save_adapter(model, tmp_path)
    loaded = load_adapter(network(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(loaded(x), network()(x))
    torch.testing.assert_close(merge_adapter(loaded)(x), model(x), rtol=1e-5, atol=1e-5)


def test_operations_that_need_low_rank_products_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(adapted(Base(model=str(tiny_llama), compute_dtype="float32")), tmp_path / "a")
    done = qlora("adapter", "compress", tmp_path / "a", "--to", tmp_path / "b", "--rank", "1")
    assert done.returncode == 4
    assert (
        "adapters of bitfit cannot be composed, compressed or exported, because they change biases"
        in " ".join(done.stderr.split())
    )
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**fields, "bias": "all"}))
    with pytest.raises(ModelError, match="bias is a field that this version of qlora does not know"):
        load_adapter(load_base(Base(model=str(tiny_llama))), tmp_path / "a")


def test_keys_of_low_rank_products_have_no_effect() -> None:
    adapter = {"method": "bitfit", "rank": 4}
    settings = {"base": {"model": "bundled/base"}, "adapter": adapter, "data": {"source": "a.jsonl"}}
    with pytest.raises(RecipeError, match=r"adapter\.rank: has no effect with adapter\.method: bitfit"):
        Recipe.from_dict(settings)


def test_its_memory_is_forecast(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=7, adapter={"method": "bitfit"})
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


def test_it_merges_if_the_base_has_the_biases(tmp_path: Path) -> None:
    base = with_biases(tmp_path / "base")
    settings = Adapter(method="bitfit", targets=["q_proj", "k_proj", "v_proj"])
    live = METHODS["bitfit"].apply(load_base(base), settings, seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(live).values():
            parameter.normal_()
    save_adapter(live, tmp_path / "adapter")
    prompts = Prompts(Data(source="-", format="completion"), byte_level())
    write_merged(MergeSource(base, tmp_path / "adapter"), "dequantized", tmp_path / "merged", prompts)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    live.eval()
    for layer, biased in zip(BiasLinear.of(live).values(), _projections(merged), strict=True):
        assert torch.equal(biased.bias, layer.merged_bias().bfloat16())
    assert (merged(input_ids=IDS).logits.float() - live(input_ids=IDS).logits).abs().max() < 0.05
    METHODS["bitfit"].apply(other := load_base(base), EVERY_LINEAR, seed=0)
    save_adapter(other, tmp_path / "everywhere")
    with pytest.raises(
        ModelError, match=r"8 of the adapted layers \(.* and 5 more\) have no bias in these files"
    ):
        MergeSource(base, tmp_path / "everywhere")


def _projections(model: nn.Module) -> list[nn.Linear]:
    ends = ("q_proj", "k_proj", "v_proj")
    return [module for name, module in model.named_modules() if name.endswith(ends)]  # type: ignore[misc]
