"""Checks every recipe that ships with the package; none is missing from the list."""

import tomllib
from pathlib import Path

import pytest
import torch
from commands_for_tests import qlora

from qlora.memory.estimate import estimate
from qlora.memory.gpus import CARDS
from qlora.model.known_architectures import KNOWN_ARCHITECTURES
from qlora.model.load import load_config, meta_model
from qlora.recipe import Base, Recipe, shipped
from qlora.recipe.checking import DEFAULTS
from qlora.recipe.reading import read
from qlora.recipe.rules import flatten

ROOT = Path(__file__).parents[1]
ON_ALPACA_UP_TO_13B = ["llama-7b", "llama-13b", "llama-3.1-8b", "mistral-7b", "qwen3-8b"]
ON_ALPACA_ABOVE_13B = ["llama-33b", "llama-65b", "llama-3.1-70b"]
CHAT_UP_TO_13B = [
    "gemma-3-12b-it", "gemma-3-1b-it", "gemma-3-4b-it", "llama-3.1-8b-instruct", "llama-3.2-1b-instruct",
    "llama-3.2-3b-instruct", "mistral-7b-instruct", "mistral-nemo-12b-instruct", "phi-3.5-mini-instruct",
    "phi-4-mini-instruct", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b-instruct",
]  # fmt: skip
CHAT_ABOVE_13B = [
    "gemma-3-27b-it", "llama-3.3-70b-instruct", "mistral-small-24b-instruct", "phi-4", "qwen3-14b", "qwen3-32b",
]  # fmt: skip
MIXTURES = [
    "deepseek-v2-lite-chat", "glm-4.7-flash", "gpt-oss-20b", "mixtral-8x7b-instruct", "qwen3-30b-a3b",
]  # fmt: skip
UP_TO_13B = ON_ALPACA_UP_TO_13B + CHAT_UP_TO_13B
ABOVE_13B = ON_ALPACA_ABOVE_13B + CHAT_ABOVE_13B
ON_THE_HUB = [*UP_TO_13B, *ABOVE_13B, *MIXTURES]
EXPECTED = sorted(["bundled-base", "quickstart", *ON_THE_HUB])

# Parameters as their publishers count them, from the model cards and the index files of the checkpoints
PARAMETERS = {
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-27b-it": 27_432_406_640,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-3.2-3b-instruct": 3_212_749_824,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "mistral-7b-instruct": 7_248_023_552,
    "mistral-nemo-12b-instruct": 12_247_782_400,
    "mistral-small-24b-instruct": 23_572_403_200,
    "phi-3.5-mini-instruct": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini-instruct": 3_836_021_760,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b-instruct": 4_022_468_096,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "deepseek-v2-lite-chat": 15_706_484_224,
    "glm-4.7-flash": 29_943_390_976,  # without the layer that predicts a second token, which transformers leaves out
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b-instruct": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
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
def test_models_from_the_hub_are_tuned_as_in_the_qlora_paper(name: str) -> None:
    recipe = Recipe.load(name)
    adapter, optimizer = recipe.adapter, recipe.optimizer
    text_only = [".*language_model.*_proj"]  # of checkpoints that also read images
    assert adapter.targets in ("all-linear", text_only)
    assert (adapter.method, adapter.rank, adapter.alpha) == ("lora", 64, 16)
    assert adapter.dropout == (0.1 if name in UP_TO_13B else 0.05)
    assert optimizer.lr == (2e-4 if name in UP_TO_13B else 1e-4)
    assert (optimizer.name, optimizer.schedule, optimizer.betas) == (
        "paged_adamw_32bit",
        "constant",
        (0.9, 0.999),
    )
    assert (recipe.training.global_batch_size, recipe.training.max_grad_norm) == (16, 0.3)
    assert (recipe.base.quantization, recipe.base.double_quant, recipe.base.block_size) == ("nf4", True, 64)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_tuned_alike_without_dropout(name: str) -> None:
    recipe = Recipe.load(name)
    adapter, optimizer = recipe.adapter, recipe.optimizer
    assert (adapter.method, adapter.targets, adapter.rank, adapter.alpha) == ("lora", "all-linear", 64, 16)
    assert (adapter.expert_rank, adapter.dropout, optimizer.lr) == (None, 0, 1e-4)


@pytest.mark.parametrize("name", [*CHAT_UP_TO_13B, *CHAT_ABOVE_13B, *MIXTURES])
def test_a_chat_recipe_reads_conversations_and_needs_no_network_to_be_forecast(name: str) -> None:
    recipe = Recipe.load(name, ["data.source=my.jsonl"])
    assert (recipe.data.format, recipe.data.max_length, recipe.data.template) == ("messages", 2048, None)
    assert recipe.base.model in KNOWN_ARCHITECTURES
    base = Base(model=recipe.base.model, init="synthetic")
    model = meta_model(base, load_config(base), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_the_list_shows_the_forecast_of_every_recipe_with_a_base_from_the_hub() -> None:
    assert shipped.memory().keys() == set(ON_THE_HUB)
    lines = qlora("recipes", "list").stdout.splitlines()
    shown = {line.split()[0]: line for line in lines if line.split()[0] in EXPECTED}
    assert sorted(shown) == EXPECTED
    for name, needed_bytes in shipped.memory().items():
        assert f"{needed_bytes / 2**30:.1f} GiB" in shown[name]
        (card,) = (card for card in CARDS if f" GB ({card.name})" in shown[name])
        smaller = [other for other in CARDS if other.bfloat16 and other.memory_bytes < card.memory_bytes]
        assert card.bfloat16  # in which the forecast was made
        assert card.memory_bytes >= needed_bytes
        assert all(other.memory_bytes < needed_bytes for other in smaller)
        assert shown[name].endswith(shipped.summary(name))


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-0.6b",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ON_THE_HUB if name != "qwen3-0.6b"),
    ],
)
def test_the_stored_forecast_is_todays(name: str) -> None:
    today = estimate(Recipe.load(name, ["training.device=cuda"])).needed_bytes
    stored = shipped.memory()[name]
    assert stored == pytest.approx(today, rel=0.01), "run python benchmarks/recipe_memory.py"


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
