"""`qlora estimate` and `qlora profile` as a user runs them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands_for_tests import qlora
from hypothesis import given
from hypothesis import strategies as st

from qlora.recipe.sizes import UNITS, parse_size

RecipeFile = Callable[..., Path]


def test_estimate_needs_only_the_config() -> None:
    run = qlora("estimate", "llama-7b", "--gpu", "24GiB", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for column in ("documents", "forecast"):
        assert found[column]["total_bytes"] == sum(found[column]["parts"].values())
    assert found["fits"] is True
    assert found["measured"] is None
    # 6.74e9 weights: 13.5 GB at 2 bytes, as in the LoRA documents; about a quarter of that in NF4
    assert found["documents"]["parts"]["base_unquantized"] == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert found["forecast"]["parts"]["base_nf4"] == pytest.approx(6.476e9 / 2, rel=1e-3)


@pytest.mark.slow  # by default, docs/guides/memory.md runs such an example
def test_estimate_prints_a_table_and_changes_that_make_it_fit() -> None:
    run = qlora("estimate", "llama-7b", "--gpu", "6GiB")
    assert run.returncode == 0, run.stderr
    assert "rule of" in run.stdout
    assert "\nRule of thumb (Hu et al. 2021): 2 bytes a weight" in run.stdout  # no markup around it
    assert "Does not fit into 6.00 GiB" in run.stdout
    assert "GiB too much, even with 1.49 GiB of optimizer state on the host." in run.stdout
    assert "training.micro_batch_size=" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["llama-7b", "--gpu", "24 bananas"], 2, "neither a memory size, such as 24GiB, nor a known card."),
        (["llama-7b", "training.memory=24 bananas"], 2, "training.memory"),
        (["llama-7b", "base.model=/no/such/folder"], 4, "no folder"),
        (["no-such-recipe"], 2, "no-such-recipe"),
        (["llama-7b", "training.memory=auto"], 2, "Pass --gpu 24GiB"),
    ],
)
def test_wrong_input_gets_one_clear_line(arguments: list[str], code: int, words: str) -> None:
    run = qlora("estimate", *arguments)
    assert run.returncode == code
    assert words in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_an_unknown_architecture_gets_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bananas"}')
    run = qlora("estimate", "llama-7b", f"base.model={tmp_path}")
    assert run.returncode == 4
    assert "bananas" in run.stderr
    assert "Traceback" not in run.stderr
    (tmp_path / "config.json").unlink()
    run = qlora("estimate", "llama-7b", f"base.model={tmp_path}")
    assert run.returncode == 4
    assert "config.json" in run.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_profile_sets_the_three_numbers_side_by_side(
    recipe_file: RecipeFile, tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / "out"
    file = recipe_file(base={"compute_dtype": dtype})
    run = qlora("profile", str(file), "--steps", "2", "--json", "--out", str(out))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    stages = found.pop("stages")
    assert "loading torch and transformers" in stages
    assert found == json.loads((out / "memory.json").read_text())
    for column in ("documents", "forecast", "measured"):
        assert found[column]["total_bytes"] == sum(found[column]["parts"].values())
    measured = found["measured"]["total_bytes"]
    assert found["forecast"]["total_bytes"] == pytest.approx(measured, rel=0.01)
    for phase in ("forward", "loss", "backward", "update", "evaluation"):
        assert found["forecast"]["phases"][phase] == pytest.approx(
            found["measured"]["phases"][phase], rel=0.03
        )
    assert {path.name for path in out.iterdir()} == {"memory.json", "memory.md", "memory.png"}
    # and no file is left where the recipe would run
    assert not list(tmp_path.glob("**/adapter"))


@given(st.integers(1, 999), st.sampled_from([unit for unit in UNITS if unit]), st.booleans(), st.booleans())
def test_sizes_are_read_as_written(number: int, unit: str, byte: bool, space: bool) -> None:
    text = f"{number}{' ' * space}{unit}{'B' * byte}"
    assert parse_size(text) == number * UNITS[unit]


@pytest.mark.parametrize(
    "text", ["24", "bananas", "24 bananas", "-3GiB", "0GiB", "", "GiB", "1e3GiB", "24GiB of it"]
)
def test_a_text_that_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a memory size"):
        parse_size(text)
