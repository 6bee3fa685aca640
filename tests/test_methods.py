"""Adapter methods, all in the same tests: they merge, are inspected, and are composed or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from methods_for_tests import adapted, logits, tiny
from tokenizers_for_tests import byte_level
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora.adapter import Adapters, load_adapter, save_adapter
from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.algebra import compose, tensors
from qlora.adapter.algebra.changes import changes
from qlora.adapter.methods import METHODS, AdapterMethod
from qlora.adapter.methods.adalora import AdaloraLinear
from qlora.adapter.trained_parts import train_modules
from qlora.cli.adapter import inspect
from qlora.data import Prompts
from qlora.errors import ModelError, UsageError
from qlora.merging.write import MergeSource, write_merged
from qlora.model.load import load_base
from qlora.recipe import Base, Data
from qlora.storage.safetensors_files import ShardReader

CHANGING_WEIGHTS = [
    name
    for name, method in METHODS.items()
    if isinstance(method, AdapterMethod) and method.layers[0].changes_weight
]
WITHOUT_SUM = [
    name for name, method in METHODS.items() if isinstance(method, AdapterMethod) and method.why_no_sum
]


def base_on_disk(folder: Path, source: Path) -> Base:
    """Write the tiny Llama with a tokenizer."""
    LlamaForCausalLM.from_pretrained(source).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return Base(model=str(folder), compute_dtype="float32")


def saved(base: Base, method: str, folder: Path, size: float = 0.1) -> nn.Module:
    """Save an adapter with random numbers; return the adapted NF4 base."""
    model = adapted(load_base(base), method, size)
    save_adapter(model, folder, base_model=base.model)
    return model


@pytest.mark.parametrize("method", CHANGING_WEIGHTS)
def test_a_merged_checkpoint_computes_the_same(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    base = base_on_disk(tmp_path / "base", tiny_llama)
    live = saved(base, method, tmp_path / "adapter", 0.3)
    prompts = Prompts(Data(source="-", format="completion"), byte_level())
    source = MergeSource(base, tmp_path / "adapter")
    write_merged(source, "dequantized", tmp_path / "merged", prompts)
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    for name, layer in AdaptedLayer.of(live).items():
        weight = layer.merged_weight()
        assert torch.equal(merged[f"{name}.weight"], weight.bfloat16()), name
    change = (logits(live) - logits(load_base(base))).abs().max()
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():  # the same in fp32, without the rounding of the file
        for name, layer in AdaptedLayer.of(live).items():
            plain.get_submodule(name).weight.copy_(layer.merged_weight())
    assert (logits(plain) - logits(live)).abs().max() < 0.01 * change


@pytest.mark.parametrize("method", CHANGING_WEIGHTS)
def test_adapters_are_switched_without_a_trace(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    wanted = {}
    for name, size in (("one", 0.1), ("two", 0.2)):
        model = adapted(tiny(tiny_llama), method, size)
        save_adapter(model, tmp_path / name)
        wanted[name] = logits(model)
    adapters = Adapters(tiny(tiny_llama))
    before = logits(adapters.model)
    for name in wanted:
        adapters.load(name, tmp_path / name)
    for name in ("one", "two", "one"):
        adapters.activate(name)
        assert torch.equal(logits(adapters.model), wanted[name])
    assert not torch.equal(wanted["one"], wanted["two"])
    adapters.deactivate()
    assert torch.equal(logits(adapters.model), before)


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if isinstance(method, AdapterMethod)]
)
def test_a_loaded_adapter_has_the_dtypes_of_the_saved_one(tmp_path: Path, method: str) -> None:
    def network() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(6, 4)})

    model = adapted(network(), method)
    save_adapter(model, tmp_path)
    loaded = load_adapter(network(), tmp_path, any_base=True)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    for own, other in zip(*(AdaptedLayer.of(each).values() for each in (model, loaded)), strict=True):
        assert getattr(own.spec, "dtype", None) == getattr(other.spec, "dtype", None)


@pytest.mark.parametrize("method", WITHOUT_SUM)
def test_changes_are_measured_and_sums_are_refused(
    tiny_llama: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_on_disk(tmp_path / "base", tiny_llama)
    model = adapted(LlamaForCausalLM.from_pretrained(tiny_llama), method, 0.1)
    train_modules(model, ["model.norm"])
    save_adapter(model, tmp_path / "a", base_model=base.model)
    layers = AdaptedLayer.of(model)
    found = changes(tmp_path / "a", ShardReader(tmp_path / "base"))
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        if layer.changes_weight:
            wanted = (layer.merged_weight() - layer.base.weight).norm().item()
            assert found[name].relative_norm == pytest.approx(
                wanted / layer.base.weight.norm().item(), rel=1e-4
            )
        else:
            wanted = layer.merged_bias().norm().item()
        assert found[name].norm == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(
        ModelError, match=rf"adapters of {method} cannot be composed, compressed or exported, because"
    ):
        tensors.read(tmp_path / "a")
    inspect(tmp_path / "a", base=str(tmp_path / "base"))
    printed = capsys.readouterr().out
    assert "norm of change" in printed
    assert "modules trained as a whole beside the adapter: model.norm" in printed
    inspect(tmp_path / "a", base=str(tmp_path / "base"), json_output=True)
    assert json.loads(capsys.readouterr().out)["layers"].keys() == layers.keys()
    with pytest.raises(UsageError, match="--picture draws spectra, and this adapter has none, because"):
        inspect(tmp_path / "a", picture=tmp_path / "a.png")


def test_changes_on_another_base_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = base_on_disk(tmp_path / "base", tiny_llama)
    saved(base, "dora", tmp_path / "a")
    other = LlamaForCausalLM.from_pretrained(tiny_llama)
    other.model.layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ModelError, match=r"up_proj\.lora_B\.weight is \[128, 8\], and the base needs \[96, 8\]"
    ):
        changes(tmp_path / "a", ShardReader(tmp_path / "other"))


def test_adalora_composes_as_lora(tiny_llama: Path, tmp_path: Path) -> None:
    base = base_on_disk(tmp_path / "base", tiny_llama)
    for name in ("a", "b"):
        model = adapted(load_base(base), "adalora", 0.3)
        for number, layer in enumerate(AdaloraLinear.of(model).values()):
            layer.prune((torch.arange(layer.rank) % (2 if name == "a" else 3) > 0) & (number > 0))
        save_adapter(model, tmp_path / name)
    parts = [(tensors.read(tmp_path / name), weight) for name, weight in (("a", 0.5), ("b", -1.0))]
    result, _ = compose.compose(parts)
    tensors.write(result, tmp_path / "sum")
    both = load_adapter(load_base(base), tmp_path / "sum", any_base=True)
    singles = [load_adapter(load_base(base), tmp_path / name) for name in "ab"]
    for name, layer in AdaptedLayer.of(both).items():
        own = [AdaptedLayer.of(single)[name] for single in singles]
        plain = layer.merged_weight() - layer.scaling * (layer.lora_b @ layer.lora_a).float()
        wanted = plain + 0.5 * (own[0].merged_weight() - plain) - (own[1].merged_weight() - plain)
        torch.testing.assert_close(layer.merged_weight(), wanted, rtol=1e-4, atol=1e-5)
    assert len(AdaptedLayer.of(both)) == len(AdaptedLayer.of(singles[0])) - 1, "one layer has no triplet"
