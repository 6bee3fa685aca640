"""Checks every recipe that ships with the package; none is missing from the list."""

import tomllib
from pathlib import Path

import pytest

from qlora.recipe import Recipe, shipped
from qlora.recipe.checking import DEFAULTS
from qlora.recipe.reading import read
from qlora.recipe.rules import flatten

ROOT = Path(__file__).parents[1]
EXPECTED = [
    "bundled-base", "llama-13b", "llama-3.1-70b", "llama-3.1-8b", "llama-33b", "llama-65b", "llama-7b",
    "mistral-7b", "quickstart", "qwen3-8b",
]  # fmt: skip
UP_TO_13B = ["llama-7b", "llama-13b", "llama-3.1-8b", "mistral-7b", "qwen3-8b"]
ABOVE_13B = ["llama-33b", "llama-65b", "llama-3.1-70b"]
SECTIONS = list(Recipe.model_fields)


def test_every_recipe_is_found_and_listed() -> None:
    assert shipped.names() == sorted(EXPECTED)
    files = [path for path in shipped.folder().rglob("*") if path.is_file()]
    assert len(files) == len(EXPECTED)  # the folder holds no file that the tests below would miss


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_is_valid(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.output == f"runs/{name}"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_is_short_and_explains_itself_and_its_command(name: str) -> None:
    lines = shipped.text(name).splitlines()
    assert len(lines) <= 40
    assert lines[0] == f"# qlora train {name}"
    assert lines[1] == f"# {shipped.summary(name)}"
    assert 20 < len(shipped.summary(name)) <= 100


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_sets_only_differences_in_pipeline_order(name: str) -> None:
    stated = read(shipped.text(name), name).value
    assert list(stated) == [section for section in SECTIONS if section in stated]
    repeated = {key for key, value in flatten(stated).items() if DEFAULTS.get(key, object()) == value}
    assert not repeated


@pytest.mark.parametrize("name", [*UP_TO_13B, *ABOVE_13B])
def test_large_models_are_tuned_as_in_the_qlora_paper(name: str) -> None:
    recipe = Recipe.load(name)
    adapter, optimizer = recipe.adapter, recipe.optimizer
    assert (adapter.method, adapter.targets, adapter.rank, adapter.alpha) == ("lora", "all-linear", 64, 16)
    assert adapter.dropout == (0.1 if name in UP_TO_13B else 0.05)
    assert optimizer.lr == (2e-4 if name in UP_TO_13B else 1e-4)
    assert (optimizer.name, optimizer.schedule, optimizer.betas) == (
        "paged_adamw_32bit",
        "constant",
        (0.9, 0.999),
    )
    assert (recipe.training.global_batch_size, recipe.training.max_grad_norm) == (16, 0.3)
    assert (recipe.base.quantization, recipe.base.double_quant, recipe.base.block_size) == ("nf4", True, 64)


def test_the_quickstart_needs_nothing_from_outside() -> None:
    recipe = Recipe.load("quickstart")
    assert recipe.base.model == "bundled/base"
    assert str(recipe.data.source).startswith("bundled/")
    assert recipe.training.device == "auto"


def test_the_bundled_base_is_pretrained_by_this_framework() -> None:
    recipe = Recipe.load("bundled-base")
    assert (recipe.adapter.method, recipe.base.init, recipe.base.quantization) == ("full", "random", "none")
    assert recipe.data.format == "completion"


def test_a_wheel_has_the_recipes_in_the_expected_folder() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {"recipes": "qlora/_recipes"}
    assert (shipped.PACKAGE / "_recipes").relative_to(ROOT) == Path("qlora/_recipes")


def test_the_recipes_inside_a_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "qlora" / "_recipes"
    installed.mkdir(parents=True)
    (installed / "only.yaml").write_text("# qlora train only\n# The one recipe of this package\n")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "qlora")
    assert shipped.names() == ["only"]
    assert shipped.summary("only") == "The one recipe of this package"
