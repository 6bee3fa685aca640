"""The difference of two checkpoints as an adapter: as close as dense float64 decompositions, with its true errors."""

import json
from pathlib import Path

import pytest
import torch
from adapters_for_tests import CONFIG, updates
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapter.algebra import extract as extracting
from qlora.adapter.algebra.extract import extract
from qlora.adapter.algebra.tensors import write
from qlora.errors import ModelError
from qlora.storage.safetensors_files import ShardReader, find_checkpoint


def network() -> nn.Module:
    """Return two blocks of two linears with biases, an embedding, a norm and a head, on the meta device."""
    with torch.device("meta"):
        blocks = [nn.ModuleDict({"up": nn.Linear(20, 30), "down": nn.Linear(30, 20)}) for _ in range(2)]
        return nn.ModuleDict(
            {
                "embed": nn.Embedding(11, 20),
                "layers": nn.ModuleList(blocks),
                "norm": nn.LayerNorm(20),
                "lm_head": nn.Linear(20, 11),
            }
        )


LINEARS = [f"layers.{i}.{kind}" for i in range(2) for kind in ("up", "down")]


def random_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in network().state_dict().items()
    }


def checkpoint(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> ShardReader:
    """Write a checkpoint as transformers does, with an index if there are several shards."""
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return ShardReader(folder)
    place = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return ShardReader(folder)


def pair(tmp_path: Path, changes: dict[str, Tensor]) -> tuple[ShardReader, ShardReader]:
    """Write (tuned, base), which differ by `changes` and are sharded differently."""
    base = random_weights(0)
    tuned = {name: tensor + changes[name] if name in changes else tensor for name, tensor in base.items()}
    return checkpoint(tmp_path / "tuned", tuned, shards=3), checkpoint(tmp_path / "base", base)


def test_a_low_rank_change_is_recovered(tmp_path: Path) -> None:
    changes = {f"{name}.weight": torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
               for name, shape in zip(LINEARS, [(30, 20), (20, 30)] * 2, strict=True)}  # fmt: skip
    found = extract(*pair(tmp_path, changes), network(), rank=3, base_model="some/base")
    write(found.adapter, tmp_path / "adapter")
    for name, update in updates(tmp_path / "adapter").items():
        torch.testing.assert_close(update.float(), changes[f"{name}.weight"], rtol=1e-4, atol=1e-5)
        assert found.deviations[name].relative < 1e-6
    assert found.not_captured == {}
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == ["down", "up"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, "some/base")


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize(("rank", "energy"), [(5, None), (None, 0.8), (None, 0.995)])
def test_the_remaining_error_is_minimal_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketched: bool, rank: int | None, energy: float | None
) -> None:
    if sketched:
        monkeypatch.setattr(extracting, "SMALL", 4)
        monkeypatch.setattr(extracting, "OVERSAMPLING", 4)
    changes = {"layers.0.up.weight": torch.linalg.qr(torch.randn(30, 20)).Q * torch.logspace(0, -2, 20)}
    tuned, base = pair(tmp_path, changes)
    found = extract(tuned, base, network(), rank=rank, energy=energy)
    (name,) = found.adapter.layers
    difference = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
    layer, values = found.adapter.layers[name], torch.linalg.svdvals(difference)
    left = (difference - layer.b.double() @ layer.a.double()).norm().item()
    assert found.deviations[name].error == pytest.approx(left, rel=1e-4)
    assert found.deviations[name].norm == pytest.approx(difference.norm().item(), rel=1e-6)
    assert left <= values[layer.rank :].norm().item() * 1.001
    if energy:
        assert left**2 <= (1 - energy) * values.square().sum() * (1 + 1e-6)
        assert values[: layer.rank - 1].square().sum() < energy * values.square().sum()
    else:
        assert layer.rank == rank


def test_changes_that_no_adapter_can_hold_are_named(tmp_path: Path) -> None:
    changes = {
        "layers.1.up.weight": torch.ones(30, 20),
        "layers.1.up.bias": 2 * torch.ones(30),
        "norm.weight": torch.ones(20),
        "embed.weight": torch.ones(11, 20),
        "lm_head.weight": torch.ones(11, 20),
    }
    tuned, base = pair(tmp_path, changes)
    found = extract(tuned, base, network(), rank=2)
    assert list(found.adapter.layers) == ["layers.1.up"], "unchanged layers get no adapter"
    expected = {
        name: tensor.norm().item() for name, tensor in changes.items() if name != "layers.1.up.weight"
    }
    assert found.not_captured == pytest.approx(expected, rel=1e-5)
    more = {**load_file(tmp_path / "base" / "model.safetensors"), "embed.weight": torch.ones(12, 20)}
    del more["norm.bias"]
    found = extract(tuned, checkpoint(tmp_path / "other", more), network(), rank=2)
    assert found.not_captured["embed.weight"] is found.not_captured["norm.bias"] is None


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole = random_weights(0)
    base = checkpoint(tmp_path / "base", whole)
    up = "layers.0.up.weight"
    wrong = {
        "missing": ({name: t for name, t in whole.items() if name != up}, "layers.0.up.weight is missing"),
        "shape": (whole | {up: torch.ones(30, 21)}, r"up.weight is \[30, 21\], but \[30, 20\] in the arch"),
        "codes": (
            whole | {up: torch.ones(300, 1, dtype=torch.uint8)},
            "up.weight is quantized: use checkpoints in 16",
        ),
        "eight bits": (whole | {up: whole[up].to(torch.float8_e4m3fn)}, "up.weight is quantized"),
        "not finite": (whole | {up: whole[up] * torch.nan}, "up.weight holds numbers that are not finite"),
        "the same": (whole, "have the same linear weights: there is nothing to extract"),
    }
    for name, (tensors, message) in wrong.items():
        with pytest.raises(ModelError, match=message) as error:
            extract(checkpoint(tmp_path / name, tensors), base, network(), rank=2)
        assert str(tmp_path / name) in str(error.value)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("no/such-model", str(tmp_path / "nowhere"), "a b"):
        with pytest.raises(ModelError, match="there is no such folder, and no such model in the local hub"):
            find_checkpoint(name)
    with pytest.raises(ModelError, match=r"there is no model.safetensors"):
        ShardReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pytorch_model.bin, a pickle, which qlora does not read"):
        ShardReader(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "missing.safetensors"}}')
    with pytest.raises(ModelError, match=r"missing.safetensors: missing or damaged"):
        ShardReader(tmp_path)
    for text in ("[]", "{", '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"index.json: cannot be read"):
            ShardReader(tmp_path)


def test_a_run_of_full_training_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "model"
    assert (find_checkpoint("bundled/base") / "model.safetensors").is_file()
