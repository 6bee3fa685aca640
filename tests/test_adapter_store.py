"""Adapter folders: written whole, read strictly, never unpickled; a refusal names the file and the reason."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapter import LoRALinear, LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.errors import ModelError, SaveError
from qlora.storage import tensor_file

CONFIG, TENSORS, IDENTITY = "adapter_config.json", "adapter_model.safetensors", "qlora.json"
FILES = [CONFIG, TENSORS, IDENTITY]


def network() -> nn.Module:
    """Return two blocks of two linears and a head, with the same weights at every call."""
    torch.manual_seed(1)
    blocks = [nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(8, 3)})


def trained(seed: int = 0, **settings: Any) -> nn.Module:
    """Return an adapted network whose B are not zero."""
    model = adapt(
        network(), LoraSpec(**{"targets": ["up", "down"], "rank": 2, "alpha": 6, **settings}), seed=seed
    )
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def contents(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (
            layer.rank,
            layer.alpha,
            layer.scaling,
            layer.dropout,
            layer.lora_a.tolist(),
            layer.lora_b.tolist(),
        )
        for name, layer in lora_layers(model).items()
    }


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_identity(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / IDENTITY).read_text())
    (folder / IDENTITY).write_text(json.dumps(record | fields))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def test_the_layout_is_that_of_peft(tmp_path: Path) -> None:
    model = trained(dropout=0.1)
    assert (
        save_adapter(model, tmp_path / "new" / "adapter", base_model="some/base", revision="abc")
        == tmp_path / "new" / "adapter"
    )
    folder = tmp_path / "new" / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    text = (folder / CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    expected = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "target_modules": ["down", "up"],
        "base_model_name_or_path": "some/base",
        "revision": "abc",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": None,
    }
    assert {key: config[key] for key in expected} == expected
    with safe_open(folder / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = set(file.keys())
    assert keys == {f"base_model.model.{name}.lora_{x}.weight" for name in lora_layers(model) for x in "AB"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.float32, "dropout": 0.25, "scaling": "alpha/sqrt(rank)"},
        {"targets": ["blocks.0.up"]},
        {"rank_pattern": {r"blocks\.1\..*": 5}, "alpha_pattern": {"down": 0.5, "blocks.1.up": 3}},
        {"targets": "all-linear", "rank": 1, "alpha": None},
    ],
)
def test_loading_gives_what_was_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(**settings)
    save_adapter(model, tmp_path)
    fresh, state = network(), torch.get_rng_state()
    loaded = load_adapter(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "the random state is unchanged"
    assert contents(loaded) == contents(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: p.dtype for name, p in loaded.named_parameters()} == dtypes
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n in dtypes if "lora_" in n}


def test_a_layer_whose_name_ends_another_s_is_not_mistaken_for_it(tmp_path: Path) -> None:
    """`up` alone would match `inner.up` too, because targets and patterns match suffixes."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(4, 4), "inner": nn.ModuleDict({"up": nn.Linear(4, 4)})})

    only = adapt(make(), LoraSpec(targets=["^up"], rank=2))
    save_adapter(only, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "up", (
        "the pattern must match the whole name"
    )
    assert contents(load_adapter(make(), tmp_path)) == contents(only)
    both = adapt(make(), LoraSpec(targets=["up"], rank=2, rank_pattern={"^up": 3}))
    save_adapter(both, tmp_path)
    assert contents(load_adapter(make(), tmp_path)) == contents(both)


def test_loading_into_an_adapted_model_replaces_its_adapter(tmp_path: Path) -> None:
    first, second = trained(dropout=0.1), trained(alpha=1, seed=7)
    save_adapter(first, tmp_path / "first")
    save_adapter(second, tmp_path / "second")
    parameters = dict(first.named_parameters())
    load_adapter(first, tmp_path / "second")
    assert contents(first) == contents(second)
    assert all(parameters[name] is parameter for name, parameter in first.named_parameters())
    with pytest.raises(ModelError, match=r"blocks.0.up has rank 2 in the file and 3 in the model"):
        load_adapter(trained(rank=3), tmp_path / "second")
    with pytest.raises(
        ModelError, match=r"no target for 2 of the layers with tensors \(blocks.0.down, blocks.1.down\)"
    ):
        load_adapter(trained(targets=["up"]), tmp_path / "second")


def test_parameters_that_are_views_of_one_tensor_are_saved(tmp_path: Path) -> None:
    model = trained()
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    save_adapter(model, tmp_path)
    assert contents(load_adapter(network(), tmp_path)) == contents(model)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (
        lambda f: [(f / x).unlink() for x in (CONFIG, TENSORS)],
        "there is no adapter: .* is missing",
    ),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "adapter_model.safetensors is missing"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read as JSON"),
    "no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "not a JSON object"),
    "another method": (lambda f: edit(f, peft_type="IA3"), 'peft_type must be "LORA"'),
    "dora": (lambda f: edit(f, use_dora=True), "lora_magnitude_vector is missing"),
    "bias": (lambda f: edit(f, bias="all"), 'bias = "all" is not supported'),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), 'init_lora_weights = "pissa" is not supported'),
    "saved modules": (
        lambda f: edit(f, modules_to_save=["head"]),
        r"base_model\.model\.head\.weight is missing",
    ),
    "unknown field": (lambda f: edit(f, tomorrow=1), "tomorrow = 1 is not supported"),
    "rank": (lambda f: edit(f, r="2"), 'r must be a whole number, not "2"'),
    "no rank": (lambda f: edit(f, r=0), "r of blocks.0.up must be a whole number of at least 1, not 0"),
    "other rank": (
        lambda f: edit(f, r=3),
        r"up.lora_A.weight is \[2, 8\], the model needs \[3, 8\]|up has rank 3 in the file and 2 in the model",
    ),
    "alpha": (
        lambda f: edit(f, lora_alpha=0),
        "lora_alpha of blocks.0.up must be a number above 0 and .*, not 0",
    ),
    "huge alpha": (
        lambda f: edit(f, lora_alpha=1e200),
        "lora_alpha of blocks.0.up must be a number above 0 and",
    ),
    "dropout": (lambda f: edit(f, lora_dropout=1.0), "lora_dropout must be at least 0 and below 1, not 1.0"),
    "pattern": (lambda f: edit(f, rank_pattern=[1]), r"rank_pattern must be an object, not \[1\]"),
    "no truth": (lambda f: edit(f, use_rslora="false"), 'use_rslora must be true or false, not "false"'),
    "expression": (
        lambda f: edit(f, alpha_pattern={"(": 1}),
        r'alpha_pattern: "\(" is not a valid regular expression',
    ),
    "targets": (
        lambda f: edit(f, target_modules=[1]),
        "target_modules must be a string or a list of strings",
    ),
    "other targets": (
        lambda f: edit(f, target_modules=["query"]),
        r'does not fit this model: .*\["query"\], match no layer of ModuleDict. Its linear layers: up \(2\)',
    ),
    "fewer targets": (lambda f: edit(f, target_modules=["up"]), "no target for 2 of the layers with tensors"),
    "more targets": (
        lambda f: edit(f, target_modules="all-linear"),
        r"no tensors for 1 of the targeted layers \(head\)",
    ),
    "layers of an expression": (
        lambda f: edit(f, target_modules=".*up", layers_to_transform=[0]),
        "need a list in target_modules",
    ),
    "pattern of no layers": (lambda f: edit(f, layers_pattern="blocks"), "needs layers_to_transform"),
    "identity": (
        lambda f: (f / IDENTITY).write_text("{}"),
        "qlora.json: the fingerprint of the base cannot be read",
    ),
    "identity of tomorrow": (
        lambda f: edit_identity(f, format=2),
        "format 2 is not supported by this version",
    ),
    "truncated": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]),
        "damaged, or not a safetensors file",
    ),
    "half a pair": (
        lambda f: rewrite(f, lambda t: t.pop("base_model.model.blocks.0.up.lora_B.weight")),
        "blocks.0.up.lora_B.weight is missing",
    ),
    "another tensor": (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.head.weight": torch.ones(3, 8)})),
        "unexpected tensor base_model.model.head.weight",
    ),
    "not finite": (
        lambda f: rewrite(f, lambda t: t["base_model.model.blocks.1.up.lora_A.weight"].fill_(torch.nan)),
        "blocks.1.up.lora_A.weight holds numbers that are not finite",
    ),
}


# An adapted model already has its layers: the config's targets are not used
CASES = [
    (damage, adapted)
    for damage in DAMAGED
    for adapted in (False, True)
    if not (adapted and "targets" in damage)
]


@pytest.mark.parametrize(("damage", "adapted"), CASES)
def test_a_damaged_folder_is_refused_and_changes_nothing(tmp_path: Path, damage: str, adapted: bool) -> None:
    save_adapter(trained(seed=3), tmp_path)
    change, message = DAMAGED[damage]
    change(tmp_path)
    model = trained() if adapted else network()
    before, names = contents(model), dict(model.named_modules()).keys()
    with pytest.raises(ModelError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert contents(model) == before
    assert dict(model.named_modules()).keys() == names


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("something was unpickled",)


def test_a_pickle_is_refused_and_the_advised_code_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    (tmp_path / TENSORS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ModelError, match=r"adapter_model.bin is a pickle.*Convert it.*python -c") as error:
        load_adapter(network(), tmp_path)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        exec(code)  # a dangerous pickle is not executed here either
    torch.save(tensors, tmp_path / "adapter_model.bin")
    exec(code)
    assert contents(load_adapter(network(), tmp_path)) == contents(model)


def test_an_unusable_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter"):
        save_adapter(network(), tmp_path / "a")
    broken = trained()
    broken["blocks"][1]["up"].lora_b.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"blocks.1.up.lora_B.weight is not finite: nothing was saved"):
        save_adapter(broken, tmp_path / "b")
    mixed = nn.ModuleDict(
        {
            x: LoRALinear(nn.Linear(4, 4), LoraSpec(rank=4, scaling=s))
            for x, s in (("a", "alpha/rank"), ("b", "alpha/sqrt(rank)"))
        }
    )
    with pytest.raises(
        ModelError, match=r"a is scaled by alpha/rank, and b by alpha/sqrt\(rank\), but PEFT's config"
    ):
        save_adapter(mixed, tmp_path / "c")
    mixed = trained(dropout=0.1)
    layer = mixed["blocks"][0]["up"]
    layer.spec = replace(layer.spec, dropout=0.2)
    with pytest.raises(ModelError, match=r"different dropout .*Train all layers with one adapter.dropout"):
        save_adapter(mixed, tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = trained()
    save_adapter(old, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match=r"cannot save the adapter: .*No space left"):
        save_adapter(trained(seed=9, rank=3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert contents(load_adapter(network(), tmp_path)) == contents(old)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SaveError, match="cannot save the adapter"):
        save_adapter(old, file)


def test_a_reader_of_the_old_adapter_keeps_it_whole(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    readers = [tmp_path / name for name in ("open config", "open tensors")]
    for name, reader in zip((CONFIG, TENSORS), readers, strict=True):
        reader.hardlink_to(tmp_path / name)  # keeps the old file alive, as a reader's open file does
    before = [reader.read_bytes() for reader in readers]
    save_adapter(trained(seed=9, rank=3), tmp_path)
    assert [reader.read_bytes() for reader in readers] == before
    assert (tmp_path / TENSORS).read_bytes() not in before


def test_a_disk_that_corrupts_data_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(tensor_file, "write", flip)
    with pytest.raises(SaveError, match="the numbers read back differ"):
        save_adapter(trained(), tmp_path)
