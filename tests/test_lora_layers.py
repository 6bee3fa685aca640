"""LoRA on convolutions and embeddings: the update, its merge, PEFT both ways, and the layers that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_for_tests import qlora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlora import merge_adapter
from qlora.adapter import (
    Adapters,
    LoraSpec,
    adapt,
    load_adapter,
    lora_layers,
    save_adapter,
    trainable_parameters,
)
from qlora.adapter.lora_conv import LoRAConv
from qlora.adapter.lora_embedding import LoRAEmbedding
from qlora.errors import ModelError, UsageError

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Ids of pixels through an embedding, two convolutions and a linear, with the same weights at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.colors = nn.Embedding(7, 6, padding_idx=2, scale_grad_by_freq=True)
        self.wide = nn.Conv2d(6, 5, (3, 2), stride=2, padding=(1, 0))
        self.point = nn.Conv2d(5, 4, 1, bias=False)
        self.line = nn.Conv1d(4, 3, 3, padding="same")
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.wide(self.colors(ids).permute(0, 3, 1, 2)))
        return self.head(self.line(self.point(x).flatten(2)).mean(2))  # type: ignore[no-any-return]


TARGETS = ["colors", "wide", "point", "line", "head"]
IDS = torch.arange(2 * 8 * 8).view(2, 8, 8) * 5 % 7


def adapted(**settings: Any) -> nn.Module:
    spec = LoraSpec(**{"rank": 3, "alpha": 5, "targets": TARGETS, "dtype": torch.float32, **settings})
    model = adapt(Net(), spec)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_a, std=0.3)
        nn.init.normal_(layer.lora_b, std=0.3)
    return model


def difference(model: nn.Module, other: nn.Module, ids: Tensor = IDS) -> float:
    with torch.no_grad():
        return float((model.eval()(ids) - other.eval()(ids)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_start_as_the_base(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    before = net(IDS)
    model = adapt(net, LoraSpec(rank=2, targets=TARGETS, dropout=0.3))
    assert torch.equal(model(IDS), before)
    assert model(IDS).dtype == dtype
    model(IDS).float().square().sum().backward()
    moved = {name.rpartition(".")[2] for name, p in trainable_parameters(model).items() if p.grad.any()}
    assert moved == {"lora_a", "lora_b"}  # an embedding's A, the others' B


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_convolution_equals_fp64_over_its_merged_weight(kind: int) -> None:
    convolution = getattr(nn, f"Conv{kind}d")
    base = convolution(4, 6, 3, stride=2, padding=2, dilation=2).double()
    layer = LoRAConv(base, LoraSpec(rank=3, alpha=7, dtype=torch.float64))
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 4, *[9] * kind, dtype=torch.float64)
    weight = layer.merged_weight().requires_grad_()
    wanted = getattr(F, f"conv{kind}d")(x, weight, base.bias, 2, 2, 2)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    (layer(x).tanh()).sum().backward()
    wanted.tanh().sum().backward()
    assert weight.grad is not None
    grad = weight.grad.flatten(1) * layer.scaling  # of B A
    a, b = layer.lora_a.detach().flatten(1), layer.lora_b.detach().flatten(1)
    torch.testing.assert_close(layer.lora_b.grad.flatten(1), grad @ a.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.lora_a.grad.flatten(1), b.T @ grad, rtol=1e-10, atol=1e-10)


def test_an_embedding_equals_fp64_over_its_merged_table() -> None:
    base = nn.Embedding(11, 5, padding_idx=4).double()
    layer = LoRAEmbedding(base, LoraSpec(rank=3, alpha=7, dtype=torch.float64))
    assert not layer.lora_a.any()
    nn.init.normal_(layer.lora_a)
    ids = torch.randint(0, 11, (3, 7))
    weight = layer.merged_weight().requires_grad_()
    wanted = F.embedding(ids, weight, padding_idx=4)
    torch.testing.assert_close(layer(ids), wanted, rtol=1e-12, atol=1e-12)
    layer(ids).tanh().sum().backward()
    wanted.tanh().sum().backward()
    assert weight.grad is not None
    grad = weight.grad * layer.scaling
    torch.testing.assert_close(layer.lora_a.grad, (grad @ layer.lora_b.detach()).T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{}, {"scaling": "alpha/sqrt(rank)"}, {"rank_pattern": {"wide": 2, "colors": 4}}]
)
def test_our_adapter_gives_the_same_output_in_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert difference(model, theirs) < 1e-6
    assert difference(model, Net()) > 1e-2
    assert difference(load_adapter(Net(), tmp_path), model) == 0


def test_an_adapter_of_peft_gives_the_same_output_here(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(Net(), tmp_path)
    assert difference(ours, theirs) < 1e-6
    theirs.train()(IDS).square().sum().backward()
    ours.train()(IDS).square().sum().backward()
    for name, layer in lora_layers(ours).items():
        for suffix, parameter in layer.saved().items():
            key = f"base_model.model.{name}{suffix}".replace(".weight", ".default.weight")
            key = key if key.endswith("weight") else f"{key}.default"
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(key).grad, rtol=1e-4, atol=1e-6)


def test_they_merge_into_plain_layers_and_switch(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = model.eval()(IDS)
    assert merge_adapter(model) is model
    assert [type(module) for module in model.children()] == [type(module) for module in Net().children()]
    assert not lora_layers(model)
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-5, atol=1e-6)
    adapters = Adapters(Net().eval())
    plain = adapters.model(IDS)
    adapters.load("a", tmp_path)
    adapters.activate("a")
    torch.testing.assert_close(adapters.model(IDS), wanted)
    adapters.deactivate()
    assert torch.equal(adapters.model(IDS), plain)


def test_dropout_draws_masks_for_convolutions_and_none_for_embeddings() -> None:
    model = adapted(dropout=0.5, targets=["colors"])
    assert torch.equal(model.train()(IDS), model(IDS))
    model = adapted(dropout=0.5, targets=["point"])
    torch.manual_seed(1)
    first = model.train()(IDS)
    assert not torch.equal(first, model(IDS))
    torch.manual_seed(1)
    assert torch.equal(first, model(IDS))
    mean = torch.stack([model(IDS) for _ in range(200)]).mean(0)  # what follows the layer is linear
    expected = model.eval()(IDS)
    plain = Net()(IDS)
    assert (mean - expected).norm() < 0.2 * (expected - plain).norm(), "the mean over the masks is the output"


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


REFUSED = {
    "groups": (nn.Conv2d(4, 4, 3, groups=2), "LoRA is not defined on x: it has 2 groups"),
    "padding mode": (nn.Conv2d(4, 4, 3, padding_mode="circular"), "its padding_mode is 'circular'"),
    "max_norm": (nn.Embedding(4, 4, max_norm=1.0), "it has max_norm"),
    "transposed": (
        nn.ConvTranspose2d(4, 4, 3),
        "matches 1 ConvTranspose2d, but no layer that the method adapts",
    ),
    "scaled": (Scaled(4, 4), "matches 1 Scaled, but no layer that the method adapts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_on_which_lora_is_not_defined_are_refused_by_name(name: str) -> None:
    layer, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        adapt(nn.ModuleDict({"x": layer}), LoraSpec(targets=["x"]))


def test_all_linear_still_means_linear_layers() -> None:
    assert list(lora_layers(adapt(Net(), LoraSpec(targets="all-linear")))) == ["head"]
    with pytest.raises(
        UsageError, match=r"Its linear layers: head \(1\). Its other layers: colors \(1\), wide \(1\)"
    ):
        adapt(Net(), LoraSpec(targets=["nothing"]))


def test_an_adapter_for_another_kind_of_layer_is_refused(tmp_path: Path) -> None:
    save_adapter(adapt(nn.ModuleDict({"x": nn.Linear(4, 4)}), LoraSpec(targets=["x"])), tmp_path)
    for other in (nn.Conv2d(4, 4, 1), nn.Embedding(4, 4), nn.Conv2d(4, 4, 1, groups=2)):
        with pytest.raises(ModelError, match=r"x\.lora|is not defined on x"):
            load_adapter(nn.ModuleDict({"x": other}), tmp_path, any_base=True)


def test_an_adapter_for_a_layer_on_which_lora_is_not_defined_is_refused(tmp_path: Path) -> None:
    save_adapter(adapt(nn.ModuleDict({"x": nn.Embedding(4, 4)}), LoraSpec(targets=["x"])), tmp_path)
    other = nn.ModuleDict({"x": nn.Embedding(4, 4, max_norm=1.0)})
    with pytest.raises(ModelError, match="lora is not defined on x: it has max_norm"):
        load_adapter(other, tmp_path, any_base=True)
    assert other["x"].weight.requires_grad, "the model is unchanged"


def saved(folder: Path, seed: int, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = adapt(
        Net(), LoraSpec(**{"rank": 2, "targets": TARGETS, "dtype": torch.float32, **settings}), seed=seed
    )
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_a, std=0.3)
        nn.init.normal_(layer.lora_b, std=0.3)
    save_adapter(model, folder)
    return model


def test_they_are_composed_compressed_exported_and_inspected(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1, rank_pattern={"wide": 4}, alpha=3)
    second = saved(tmp_path / "b", 2, targets=["wide", "colors", "line"], scaling="alpha/sqrt(rank)")
    for arguments in (
        ["compose", f"{tmp_path}/a:0.5", f"{tmp_path}/b:-2", "--to", f"{tmp_path}/sum"],
        ["compress", f"{tmp_path}/sum", "--energy", "1", "--to", f"{tmp_path}/small", "--dtype", "float32"],
        ["export", f"{tmp_path}/sum", "--to", f"{tmp_path}/plain"],
    ):
        done = qlora("adapter", *arguments)
        assert done.returncode == 0, done.stderr
    wanted = Net().eval()
    with torch.no_grad():
        for model, weight in ((first, 0.5), (second, -2)):
            for name, layer in lora_layers(model).items():
                update = layer.merged_weight() - layer.base.weight
                wanted.get_parameter(f"{name}.weight").add_(weight * update)
    for folder in ("sum", "small", "plain"):
        assert difference(load_adapter(Net(), tmp_path / folder), wanted) < 1e-5, folder
        assert difference(peft.PeftModel.from_pretrained(Net(), tmp_path / folder), wanted) < 1e-5, folder
    done = qlora("adapter", "inspect", tmp_path / "a", "--json")
    layers = json.loads(done.stdout)["layers"]
    for name, layer in lora_layers(first).items():
        update = (layer.merged_weight() - layer.base.weight).flatten(1)
        assert layers[name]["norm"] == pytest.approx(update.norm().item(), rel=1e-4)
        assert layers[name]["rank"] == layer.rank


def test_layers_of_different_kinds_are_not_composed(tmp_path: Path) -> None:
    for name, layer in (("a", nn.Conv2d(4, 4, 1)), ("b", nn.Linear(4, 4)), ("c", nn.Embedding(4, 4))):
        model = adapt(nn.ModuleDict({"x": layer}), LoraSpec(targets=["x"], rank=2))
        save_adapter(model, tmp_path / name)
    for pair, kinds in (("ab", "a convolution with kernel"), ("bc", "a layer with lora_embedding_A")):
        parts = [f"{tmp_path / name}:1" for name in pair]
        done = qlora("adapter", "compose", *parts, "--to", tmp_path / "sum", "--any-base")
        assert done.returncode == 4
        assert kinds in " ".join(done.stderr.split())


def test_recipes_adapt_linear_layers_only(recipe_file: Callable[..., Path]) -> None:
    file = recipe_file(adapter={"targets": ["embed_tokens", "q_proj"]})
    done = qlora("train", file)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "adapter.targets: model.embed_tokens: a recipe adapts linear layers only" in said


def test_the_base_s_own_weight_in_a_file_of_peft_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "adapter_model.safetensors"
    own = {"base_model.model.colors.base_layer.weight": Net().colors.weight.detach()}  # as PEFT writes it
    save_file(load_file(file) | own, file)
    with pytest.raises(ModelError, match=r"colors\.base_layer\.weight is .*save_embedding_layers=False"):
        load_adapter(Net(), tmp_path)
