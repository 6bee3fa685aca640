"""Spectra of adapters against dense matrices, and the verdict on the rank in cases where the answer is known."""

import json
import math
from pathlib import Path

import pytest
import torch
from adapters_for_tests import updates, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora.adapter.algebra.module_types import places
from qlora.adapter.algebra.spectrum import Spectrum, judge, spectra
from qlora.adapter.algebra.tensors import read
from qlora.errors import SaveError, UsageError
from qlora.report.spectrum_picture import draw
from qlora.storage.safetensors_files import ShardReader

LAYERS = {f"model.layers.{i}.{kind}": (12, 10, 4) for i in range(2) for kind in ("mlp.up", "attn.q")}


def test_spectra_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LAYERS)
    for name, update in updates(folder).items():
        found = spectra(read(folder))[name]
        expected = torch.linalg.svdvals(update)
        torch.testing.assert_close(torch.tensor(found.singular_values).double(), expected[:4].double())
        assert found.norm == pytest.approx(update.norm().item())
        shares = expected[:4] / expected.sum()
        entropy = -(shares * shares.log()).sum()
        assert found.effective_rank == pytest.approx(entropy.exp().item())
        energy = expected.square().cumsum(0) / expected.square().sum()
        assert found.rank_for(0.9) == int((energy < 0.9).sum()) + 1
        assert found.last_quarter == pytest.approx((expected[3] ** 2 / expected.square().sum()).item())
        assert found.relative_norm is None


@given(st.integers(1, 40))
def test_equal_singular_values_have_the_full_effective_rank(rank: int) -> None:
    flat = Spectrum(rank, [2.0] * rank)
    assert flat.effective_rank == pytest.approx(rank)
    assert flat.rank_for(1.0) == rank
    assert flat.rank_for(0.5) == math.ceil(rank / 2)
    assert flat.last_quarter == pytest.approx(max(1, rank // 4) / rank)


def test_one_direction_has_effective_rank_one() -> None:
    single = Spectrum(8, [3.0, *[0.0] * 7])
    assert (single.effective_rank, single.rank_for(0.99), single.last_quarter) == (1.0, 1, 0.0)
    nothing = Spectrum(8, [0.0] * 8)
    assert (nothing.effective_rank, nothing.rank_for(0.99), nothing.last_quarter) == (0.0, 0, 0.0)
    assert json.dumps(nothing.as_json())


def test_norms_are_compared_with_the_base_where_it_holds_floats(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weight = torch.randn(12, 10)
    save_file(
        {
            "model.layers.0.mlp.up.weight": weight,
            "layers.0.attn.q.weight": weight.half(),  # as in a file of the model without its head
            "model.layers.1.attn.q.weight": torch.zeros(60, 1, dtype=torch.uint8),  # NF4 codes
        },
        base / "model.safetensors",
    )
    found = spectra(read(write_adapter(tmp_path / "a", LAYERS)), ShardReader(base))
    relative = {name: layer.relative_norm for name, layer in found.items()}
    up, q = found["model.layers.0.mlp.up"], found["model.layers.0.attn.q"]
    assert relative["model.layers.0.mlp.up"] == pytest.approx(up.norm / weight.norm().item())
    assert relative["model.layers.0.attn.q"] == pytest.approx(q.norm / weight.norm().item(), rel=1e-3)
    assert relative["model.layers.1.mlp.up"] is relative["model.layers.1.attn.q"] is None


def falling(rank: int, *, used: int) -> dict[str, Spectrum]:
    """Return layers whose first `used` directions hold 99.9% of the energy in equal parts."""
    values = [1.0] * used + [math.sqrt(0.001 * used / max(rank - used, 1))] * (rank - used)
    return {f"layers.{i}.q": Spectrum(rank, values) for i in range(10)}


@pytest.mark.parametrize(
    ("rank", "used", "kind"),
    [
        (16, 4, "too large"),
        (16, 8, "too large"),
        (16, 10, "fits"),
        (16, 12, "may be too small"),
        (4, 4, "may be too small"),
        (2, 2, "may be too small"),
        (1, 1, "unclear"),
    ],
)
def test_the_verdict_counts_the_directions_that_hold_the_energy(rank: int, used: int, kind: str) -> None:
    verdict = judge(falling(rank, used=used))
    assert verdict.kind == kind
    assert verdict.enough == (used if kind == "too large" else None)
    if kind != "unclear":
        assert f"{used} directions hold 99%" in verdict.sentence
        assert f"Rank {rank} " in verdict.sentence


def test_the_suggested_rank_is_enough_for_nine_layers_of_ten() -> None:
    layers = falling(16, used=3)
    layers["layers.0.q"] = falling(16, used=15)["layers.0.q"]
    assert judge(layers).enough == 3
    layers["layers.1.q"] = falling(16, used=7)["layers.1.q"]
    assert judge(layers).enough == 7


def test_layers_that_learned_nothing_do_not_count() -> None:
    layers = falling(16, used=16) | {f"layers.{i}.v": Spectrum(16, [0.0] * 16) for i in range(50)}
    assert judge(layers).kind == "may be too small"
    assert judge({"v": Spectrum(16, [0.0] * 16)}).sentence == "Every update is zero: nothing was learned."


def test_kinds_are_named_as_briefly_as_possible() -> None:
    assert places(["model.layers.3.self_attn.q_proj", "model.layers.10.mlp.up"]) == {
        "model.layers.3.self_attn.q_proj": ("q_proj", 3),
        "model.layers.10.mlp.up": ("up", 10),
    }
    assert places(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "head"]) == {
        "h.0.attn.c_proj": ("attn.c_proj", 0),
        "h.0.mlp.c_proj": ("mlp.c_proj", 0),
        "h.0.mlp.c_fc": ("c_fc", 0),
        "head": ("head", 0),
    }
    assert places(["encoder.block.1.q", "decoder.block.1.q"]) == {
        "encoder.block.1.q": ("encoder.block.q", 1),
        "decoder.block.1.q": ("decoder.block.q", 1),
    }
    assert places(["layers.2.experts.7.up", "layers.2.experts.8.up", "0.up"]) == {
        "layers.2.experts.7.up": ("experts.*.up", 2),
        "layers.2.experts.8.up": ("experts.*.up", 2),
        "0.up": ("up", 0),
    }


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_written_whole_without_other_files(tmp_path: Path, suffix: str) -> None:
    layers = falling(16, used=3) | {"layers.3.up": Spectrum(2, [1.0, 0.0]), "odd": Spectrum(4, [0.0] * 4)}
    path = tmp_path / "new" / f"a{suffix}"
    for _ in range(2):  # the second drawing replaces the first
        draw(layers, path, "a title")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a.safetensors: a picture's name ends in .png"):
        draw(falling(4, used=2), tmp_path / "a.safetensors", "")
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="cannot save the picture"):
        draw(falling(4, used=2), tmp_path / "file" / "a.png", "")


def test_the_picture_shows_effective_ranks_and_curves(tmp_path: Path) -> None:
    layers = {"layers.0.q": Spectrum(4, [1.0, 1.0, 0.0, 0.0]), "layers.1.up": Spectrum(4, [1.0] * 4)}
    draw(layers, tmp_path / "a.svg", "mine")
    text = (tmp_path / "a.svg").read_text()
    for shown in ("mine: median effective rank 3.0", "2.0", "4.0", "effective rank (of 4)", "energy lost"):
        assert f"<!-- {shown}" in text, shown
