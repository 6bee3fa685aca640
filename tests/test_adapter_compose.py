"""Sums and approximations of adapters, compared with dense float64 matrices and with PEFT's reading of the files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import CONFIG, updates, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.adapter.algebra.compose import compose, compress, relative_error
from qlora.adapter.algebra.tensors import read, write
from qlora.errors import ModelError

FIRST = {"blocks.0.up": (9, 7, 2), "blocks.0.down": (7, 9, 3), "blocks.1.up": (9, 7, 2)}
SECOND = {"blocks.0.up": (9, 7, 5), "blocks.1.up": (9, 7, 4), "blocks.1.gate": (9, 7, 1)}

WEIGHTS = st.floats(0.01, 4) | st.floats(-4, -0.01)


def two(tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    """Write two adapters that differ in ranks, layers, scaling and dtype."""
    return (
        write_adapter(tmp_path / "a", FIRST, seed=1, dtype=torch.bfloat16, **config),
        write_adapter(tmp_path / "b", SECOND, seed=2, alpha=3, use_rslora=True, dtype=torch.float16),
    )


def weighted_sum(parts: list[tuple[Path, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in parts:
        for name, update in updates(folder).items():
            total[name] = total.get(name, 0) + weight * update
    return total


@settings(deadline=None, max_examples=20)
@given(v=WEIGHTS, w=WEIGHTS)
def test_the_sum_is_exact_but_for_the_rounding_of_b(
    tmp_path_factory: pytest.TempPathFactory, v: float, w: float
) -> None:
    tmp_path = tmp_path_factory.mktemp("sum")
    parts = list(zip(two(tmp_path), (v, w), strict=True))
    adapter, deviations = compose([(read(folder), weight) for folder, weight in parts])
    write(adapter, tmp_path / "sum")
    expected, found = weighted_sum(parts), updates(tmp_path / "sum")
    assert found.keys() == expected.keys() == deviations.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=1e-6, atol=1e-6 * update.norm().item())
        assert deviations[name].norm == pytest.approx(update.norm().item())
        error = (found[name] - update).norm().item()
        assert deviations[name].error == pytest.approx(error, rel=1e-3, abs=1e-13)
    ranks = {"blocks.0.up": 7, "blocks.0.down": 3, "blocks.1.up": 6, "blocks.1.gate": 1}
    assert {name: layer.rank for name, layer in adapter.layers.items()} == ranks
    stored_a = torch.cat([read(folder).layers["blocks.0.up"].a.float() for folder, _ in parts])
    assert torch.equal(adapter.layers["blocks.0.up"].a, stored_a), "A is not rounded at all"


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.bfloat16, 9), (torch.float16, 12)])
def test_the_rounding_is_that_of_the_stored_dtype(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    first, second = two(tmp_path)
    _, deviations = compose([(read(first), 0.7), (read(second), 0.3)], dtype=dtype)
    for deviation in deviations.values():
        assert 2.0 ** -(bits + 4) < deviation.relative < 2.0 ** -(bits - 1)


@pytest.mark.parametrize("rank", [1, 2, 4, 30])
def test_a_lower_rank_is_the_best_of_its_rank(tmp_path: Path, rank: int) -> None:
    parts = list(zip(two(tmp_path), (0.7, -0.3), strict=True))
    adapter, deviations = compose([(read(folder), weight) for folder, weight in parts], rank=rank)
    write(adapter, tmp_path / "small")
    found = updates(tmp_path / "small")
    errors, norms = [], []
    for name, update in weighted_sum(parts).items():
        best = torch.linalg.svdvals(update)[rank:].norm().item()
        assert (found[name] - update).norm().item() == pytest.approx(best, abs=1e-5)
        assert deviations[name].error == pytest.approx(best, abs=1e-5)
        assert adapter.layers[name].rank <= rank
        errors.append(best)
        norms.append(update.norm().item())
    expected = torch.tensor(errors).norm() / torch.tensor(norms).norm()
    assert relative_error(deviations.values()) == pytest.approx(expected.item(), abs=1e-6)


def test_an_adapter_minus_itself_is_zero(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", FIRST)
    adapter, deviations = compose([(read(folder), 0.3), (read(folder), -0.3)])
    assert all(layer.update.norm() == 0 for layer in adapter.layers.values())
    assert relative_error(deviations.values()) == 0.0


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_compressing_keeps_the_energy_and_the_dtype(tmp_path: Path, energy: float) -> None:
    whole = read(
        write_adapter(tmp_path / "a", {"up": (30, 20, 12), "down": (20, 30, 12)}, dtype=torch.bfloat16)
    )
    small, deviations = compress(whole, energy=energy)
    for name, layer in small.layers.items():
        assert layer.a.dtype == layer.b.dtype == torch.bfloat16
        squares = torch.linalg.svdvals(updates(tmp_path / "a")[name]).square()
        assert squares[: layer.rank].sum() / squares.sum() >= energy - 1e-9
        assert squares[: layer.rank - 1].sum() / squares.sum() < energy
        assert deviations[name].relative ** 2 <= 1 - energy + 2**-7
    assert compress(whole, energy=energy, dtype=torch.float32)[0].layers["up"].a.dtype == torch.float32


TARGETS: dict[str, tuple[Any, Any, Any]] = {
    "lists are joined": (["up", "down"], ["gate", "up"], ["down", "gate", "up"]),
    "the same stays": ("all-linear", "all-linear", "all-linear"),
    "names otherwise": (
        None,
        ["gate", "up"],
        r"blocks\.0\.down|blocks\.0\.up|blocks\.1\.up|blocks\.1\.gate",
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_mean_the_layers_of_both(tmp_path: Path, case: str) -> None:
    first, second, expected = TARGETS[case]
    a = read(write_adapter(tmp_path / "a", FIRST, target_modules=first))
    b = read(write_adapter(tmp_path / "b", SECOND, target_modules=second))
    adapter, _ = compose([(a, 1.0), (b, 1.0)])
    assert adapter.config["target_modules"] == expected
    write(adapter, tmp_path / "sum")
    assert read(tmp_path / "sum").layers.keys() == {**FIRST, **SECOND}.keys()


def test_bases_must_be_the_same(tmp_path: Path) -> None:
    one = read(write_adapter(tmp_path / "a", FIRST))
    unnamed = read(write_adapter(tmp_path / "b", FIRST, base_model_name_or_path=None))
    other = read(write_adapter(tmp_path / "c", FIRST, base_model_name_or_path="other/base"))
    newer = read(write_adapter(tmp_path / "d", FIRST, revision="v2"))
    same = read(write_adapter(tmp_path / "e", FIRST, revision="main"))
    compose([(one, 1.0), (unnamed, 1.0), (same, 1.0)])
    with pytest.raises(ModelError, match=r"different bases: some/base and other/base"):
        compose([(one, 1.0), (other, 1.0)])
    with pytest.raises(ModelError, match=r"different bases: some/base and some/base@v2"):
        compose([(one, 1.0), (newer, 1.0)])
    adapter, _ = compose([(one, 1.0), (other, 1.0)], any_base=True)
    assert adapter.base == "some/base"


def test_shapes_must_agree(tmp_path: Path) -> None:
    one = read(write_adapter(tmp_path / "a", {"up": (9, 7, 2)}))
    other = read(write_adapter(tmp_path / "b", {"up": (9, 8, 2)}))
    with pytest.raises(ModelError, match=r"up is \[9, 7\] and \[9, 8\] in different adapters"):
        compose([(one, 1.0), (other, 1.0)])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_computes_the_sum(tmp_path: Path, tiny_llama: Path) -> None:
    """PEFT adds the same update to the base's weights when it loads the composed folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    attention = "model.layers.{}.self_attn.{}"
    first = {attention.format(i, "q_proj"): (64, 64, 2 + i) for i in range(2)}
    second = {**first, attention.format(0, "k_proj"): (32, 64, 3)}
    parts = [
        (write_adapter(tmp_path / "a", first, seed=1, base_model_name_or_path=str(tiny_llama)), 0.7),
        (write_adapter(tmp_path / "b", second, seed=2, alpha=1, use_rslora=True, target_modules="|".join(second),
                       base_model_name_or_path=str(tiny_llama)), -0.3),
    ]  # fmt: skip
    adapter, _ = compose([(read(folder), weight) for folder, weight in parts])
    write(adapter, tmp_path / "sum")
    assert json.loads((tmp_path / "sum" / CONFIG).read_text())["rank_pattern"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "sum")
    found = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    expected = weighted_sum(parts)
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=1e-5, atol=1e-5 * update.abs().max().item())
