"""Many adapters on one base: each gives its own outputs, and the base is unchanged to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs_for_tests import fingerprint, update
from torch import Tensor, nn

from qlora.adapter import Adapters, LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.identity import BaseIdentity
from qlora.errors import ModelError, UsageError
from qlora.model.load import load_base
from qlora.recipe import Base

SETTINGS: dict[str, dict[str, Any]] = {
    "narrow": {"rank": 2, "targets": "attention", "dropout": 0.5},
    "wide": {"rank": 9, "alpha": 20, "targets": ["mlp.up_proj", "q_proj"]},
    "patterned": {"rank": 4, "targets": "all-linear", "rank_pattern": {"v_proj": 6}},
}
IDS = torch.arange(10)[None] * 7


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = update(adapt(load_base(Base(model=str(tiny_llama))), LoraSpec(**settings)), seed=seed)
        save_adapter(model, place / name)
    return {name: place / name for name in SETTINGS}


@pytest.fixture
def model(tiny_llama: Path) -> nn.Module:
    return load_base(Base(model=str(tiny_llama), compute_dtype="float32")).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_each_adapter_gives_its_own_output_and_the_base_stays(
    model: nn.Module, folders: dict[str, Path], tiny_llama: Path
) -> None:
    bytes_before, base = fingerprint(model), logits(model)
    adapters = Adapters(model)
    for name, folder in folders.items():
        adapters.load(name, folder)
    assert adapters.names == list(SETTINGS)
    assert torch.equal(logits(model), base)
    for name in ["wide", "narrow", "patterned", "wide"]:
        adapters.activate(name)
        assert adapters.active == name
        alone = load_adapter(load_base(Base(model=str(tiny_llama), compute_dtype="float32")), folders[name])
        assert torch.equal(logits(model), logits(alone.eval()))  # also checks that eval mode has no dropout
        assert {n: layer.rank for n, layer in lora_layers(model).items()} == {
            n: layer.rank for n, layer in lora_layers(alone).items()
        }
    adapters.deactivate()
    assert adapters.active is None
    assert not lora_layers(model)
    assert torch.equal(logits(model), base)
    assert fingerprint(model) == bytes_before


def test_a_layer_that_is_used_twice_is_switched_in_both_places(tmp_path: Path) -> None:
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.ModuleDict({"up": shared}), "two": nn.ModuleDict({"up": shared})})
    save_adapter(update(adapt(model, LoraSpec(rank=2, targets=["one.up"]))), tmp_path)
    model = nn.ModuleDict({"one": nn.ModuleDict({"up": shared}), "two": nn.ModuleDict({"up": shared})})
    adapters = Adapters(model)
    adapters.load("a", tmp_path)
    adapters.activate("a")
    assert model["one"]["up"] is model["two"]["up"] is not shared  # type: ignore[index]
    adapters.deactivate()
    assert model["one"]["up"] is model["two"]["up"] is shared  # type: ignore[index]


def test_switching_creates_no_tensor(
    model: nn.Module, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = Adapters(model)
    for name, folder in folders.items():
        adapters.load(name, folder)

    class NoTensors(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "Device" in str(func) or "__get__" in str(func):
                return func(*args, **(kwargs or {}))
            raise AssertionError(f"switching called {func}")

    with NoTensors():
        for name in [*folders, None, "wide"]:
            adapters.activate(name)


def test_a_failed_load_changes_nothing(model: nn.Module, folders: dict[str, Path], tmp_path: Path) -> None:
    adapters = Adapters(model)
    adapters.load("wide", folders["wide"])
    adapters.activate("wide")
    before = logits(model)
    small = update(adapt(nn.ModuleDict({"q_proj": nn.Linear(3, 3)}), LoraSpec(targets=["q_proj"])))
    save_adapter(small, tmp_path / "stranger")
    save_adapter(small, tmp_path / "misfit", base=BaseIdentity())
    for name, folder, error, said in [
        ("wide", folders["narrow"], UsageError, "already"),
        ("stranger", tmp_path / "stranger", ModelError, "trained on an unnamed base"),
        ("misfit", tmp_path / "misfit", ModelError, "no tensors for|does not fit"),
        ("nowhere", tmp_path / "missing", ModelError, "no adapter"),
    ]:
        with pytest.raises(error, match=said):
            adapters.load(name, folder)
        assert adapters.names == ["wide"]
        assert adapters.active == "wide"
        assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="no adapter is named 'x'; loaded: wide"):
        adapters.activate("x")
    assert torch.equal(logits(model), before)
    with pytest.raises(ModelError, match="adapted already"):
        Adapters(model)
    adapters.unload("wide")
    assert adapters.names == []
    assert not lora_layers(model)


def test_an_active_adapter_can_be_trained_and_saved(
    model: nn.Module, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapters = Adapters(model)
    adapters.load("wide", folders["wide"])
    adapters.activate("wide")
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.lora_a.grad is not None for layer in lora_layers(model).values())
    save_adapter(model, tmp_path / "again")
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (folders["wide"] / "adapter_model.safetensors").read_bytes()
