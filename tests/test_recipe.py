"""A valid recipe: its meaning, its defaults, and writing and reading it again."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

import qlora
from qlora.cli.recipes import app
from qlora.errors import RecipeError, SaveError, UsageError
from qlora.formats import FORMATS
from qlora.recipe import Adapter, Base, Data, Recipe
from qlora.recipe.fields import names, resolved
from qlora.recipe.reading import read
from qlora.recipe.rules import IDLE, MAPPINGS, flatten, keys_without_effect
from qlora.recipe.scalars import scalar
from qlora.recipe.unknown import ELSEWHERE
from qlora.tracking import BACKENDS

SMALL = "base: {model: some/model}\ndata: {source: some/data}\n"


def write(folder: Path, text: str, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_follow_the_documents(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, SMALL))
    assert recipe.adapter == Adapter(
        rank=8, alpha=None, dropout=0.0, targets="all-linear", scaling="alpha/rank"
    )
    assert recipe.adapter.resolved_alpha == 8.0
    assert (recipe.base.quantization, recipe.base.double_quant, recipe.base.block_size) == ("nf4", True, 64)
    assert not recipe.base.trust_remote_code
    assert (recipe.optimizer.name, recipe.optimizer.schedule) == ("paged_adamw_32bit", "constant")
    assert 1e-4 <= recipe.optimizer.lr <= 5e-4
    assert recipe.training.max_grad_norm == 0.3
    assert recipe.training.global_batch_size == 16


def test_alpha_is_used_if_it_is_given() -> None:
    assert Adapter(rank=64, alpha=16).resolved_alpha == 16.0


def test_the_run_is_named_after_the_file_unless_output_is_set(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL, "seven.yaml")
    assert (Recipe.load(path).output, Recipe.load(path).name) == ("runs/seven", "seven")
    assert Recipe.load(path, ["output=elsewhere/eight"]).name == "eight"
    assert Recipe.load(str(path), ["output=null"]).output == "runs/seven"


def test_overrides_replace_add_and_empty(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "adapter: {rank: 4, dropout: 0.1}\n")
    recipe = Recipe.load(
        path,
        [
            "adapter.rank=16",
            "training.max_steps=20",
            "optimizer.lr=1e-4",
            "adapter.targets=[q_proj, v_proj]",
            "adapter.rank_pattern.layers.0.q_proj=2",
            "tracking.wandb={mode: offline, tags: [a]}",
            "data.source=a=b",
            "training.save_every=",
        ],
    )
    assert (recipe.adapter.rank, recipe.adapter.dropout) == (16, 0.1)
    assert recipe.adapter.rank_pattern == {"layers.0.q_proj": 2}
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert (recipe.training.max_steps, recipe.training.save_every) == (20, None)
    assert recipe.optimizer.lr == 1e-4
    assert recipe.tracking.wandb.tags == ["a"]
    assert recipe.data.source == "a=b"


def test_the_last_of_two_overrides_of_a_key_wins(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, SMALL), ["training.seed=1", "training.seed=2"])
    assert recipe.training.seed == 2


def test_settings_that_an_override_makes_idle_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "adapter: {rank: 64, targets: all-linear}\n")
    recipe = Recipe.load(path, ["adapter.method=full", "base.quantization=none"])
    assert recipe.adapter == Adapter(method="full")
    with pytest.raises(
        RecipeError, match=r"^command line: adapter.rank: has no effect with adapter.method: full"
    ):
        Recipe.load(path, ["adapter.method=full", "base.quantization=none", "adapter.rank=4"])


def test_a_file_saved_on_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert Recipe.load(path).base.model == "some/model"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("2E+3", 2000.0), (".5", 0.5), ("1.", 1.0), ("-0", 0), ("+7", 7), ("0o17", 15),
        ("0xff", 255), ("1e400", math.inf), ("-.INF", -math.inf), ("true", True), ("FALSE", False),
        ("~", None), ("Null", None), ("", None),
        # text in YAML 1.2, but not in YAML 1.1
        ("on", "on"), ("no", "no"), ("y", "y"), ("1:30", "1:30"), ("1_000", "1_000"), ("0b1", "0b1"),
        ("tRUE", "tRUE"), ("010", "010"), ("1e", "1e"), ("nan", "nan"), ("2026-01-01", "2026-01-01"),
    ],
)  # fmt: skip
def test_plain_scalars_are_read_as_in_yaml_1_2(text: str, value: Any) -> None:
    assert (scalar(text), type(scalar(text))) == (value, type(value))


def test_nan_and_huge_integers_are_floats() -> None:
    assert math.isnan(scalar(".nan"))
    assert isinstance(scalar("9" * 5000), float)  # int() would raise


NUMBERS = st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)


@given(st.recursive(st.none() | st.booleans() | NUMBERS | WORDS, lambda inner: st.lists(inner, max_size=3)))
def test_json_is_yaml(value: Any) -> None:
    # YAML refuses some characters, and the error names them; JSON escapes the others
    document = read(json.dumps(value), "here")
    allowed = not document.problems
    assert (document.value == value) if allowed else all("character U+" in p.text for p in document.problems)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=12)
COUNT = st.integers(1, 10**6)
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "base.revision": TEXT,
    "base.init": st.sampled_from(["pretrained", "synthetic", "random"]),
    "base.quantization": st.sampled_from(["nf4", "none"]),
    "base.block_size": st.sampled_from([64, 128, 4096]),
    "adapter.method": st.sampled_from(["lora", "full", "dora", "adalora", "vera"]),
    "adapter.budget.initial_rank": st.none() | COUNT,
    "adapter.budget.final": st.floats(0, 0.99),
    "adapter.rank": COUNT,
    "adapter.alpha": st.none() | st.floats(1e-3, 1e3),
    "adapter.scaling": st.sampled_from(["alpha/rank", "alpha"]),
    "adapter.targets": st.just("all-linear") | st.lists(TEXT.map(re.escape), min_size=1, max_size=3),
    "adapter.train_tokens": st.just("new") | st.lists(TEXT, max_size=2),
    "adapter.train_modules": st.lists(TEXT.map(re.escape), max_size=2),
    "adapter.rank_pattern": st.dictionaries(TEXT.map(re.escape), COUNT, max_size=2),
    "data.source": st.just("bundled/tickets/train.jsonl") | TEXT,
    "data.format": st.sampled_from(sorted(FORMATS)),
    "data.held_out": st.just(0) | st.integers(0, 99) | st.floats(0.01, 0.99) | TEXT,
    "training.save_every": st.none() | COUNT,
    "training.samples": st.integers(0, 9),
    "training.activation_checkpointing": st.sampled_from(["none", "mlp", "full"])
    | st.fixed_dictionaries({}, optional={"full": st.integers(0, 99), "mlp": st.integers(0, 99)}),
    "training.activation_offloading": st.booleans(),
    "optimizer.name": st.sampled_from(["adamw", "lion_8bit"]),
    "optimizer.lr": st.floats(1e-12, 10),
    "optimizer.betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    "tracking.wandb.mode": st.sampled_from(["auto", "disabled"]),
    "tracking.wandb.tags": st.lists(TEXT, max_size=3),
    "output": TEXT,
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=CHOICES))
def test_a_recipe_written_and_read_is_the_same_recipe(tmp_path: Path, chosen: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"base": {"model": "some/model"}, "data": {"source": "some/data"}}
    for key, value in chosen.items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    try:
        recipe = Recipe.from_dict(nested)
    except RecipeError:
        return  # settings that exclude each other, or a text that looks like another type
    again = Recipe.load(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert again.to_yaml() == recipe.to_yaml()


def test_the_written_recipe_has_every_setting_that_has_an_effect(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, SMALL))
    written = read(recipe.to_yaml(), "here").value
    every = flatten(recipe.to_dict())
    idle = keys_without_effect(every)
    assert list(flatten(written)) == [key for key in every if key not in idle]  # in the order of the schema
    assert "budget" not in written["adapter"], "every key of this section is AdaLoRA's"
    full = Recipe.load(write(tmp_path, SMALL), ["adapter.method=full", "base.quantization=none"])
    assert read(full.to_yaml(), "here").value["adapter"] == {"method": "full"}


def test_a_recipe_does_not_change_and_can_be_sent_to_another_process() -> None:
    recipe = Recipe.load("quickstart")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1  # type: ignore[misc]


def test_a_recipe_made_in_python_gets_the_same_checks() -> None:
    recipe = Recipe(base=Base(model="some/model"), data=Data(source="some/data"))
    assert recipe.output == "runs/recipe"
    assert Recipe.from_dict({"base": {"model": "some/model"}, "data": {"source": "some/data"}}) == recipe
    with pytest.raises(ValidationError, match=r"full needs base\.quantization: none"):
        Recipe(base=Base(model="m"), data=Data(source="s"), adapter=Adapter(method="full"))
    with pytest.raises(RecipeError, match=r"^recipe: data\.source: must be text"):
        Recipe.from_dict({"base": {"model": "m"}, "data": {"source": 3}})


def test_the_schema_describes_every_setting_and_allows_no_other() -> None:
    schema = Recipe.json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert len(names(schema)) > 55
    for section in sections:
        assert section["additionalProperties"] is False
        for name, setting in section["properties"].items():
            described = {**resolved(setting, schema), **setting}["description"]
            assert described.endswith("."), name
            assert "\n" not in described, name
    assert schema["required"] == ["base", "data"]


def test_rules_and_hints_name_settings_that_exist() -> None:
    known = set(names(Recipe.json_schema()))
    assert set(ELSEWHERE.values()) <= known
    assert set(MAPPINGS) <= known
    assert {key for keys, reason, _ in IDLE for key in (*keys, reason)} <= known


def test_every_setting_is_read_somewhere() -> None:
    package = Path(qlora.__file__).parent
    source = "\n".join(p.read_text() for p in package.rglob("*.py") if "recipe" not in p.parts)
    leaves = {name.rpartition(".")[2] for name in flatten(Recipe.load("quickstart").to_dict())}
    unread = {name for name in leaves if not re.search(rf"\.{name}\b", source)}
    # alpha is read as resolved_alpha, a tracker's section by its name, and version by the reader
    assert unread - {"alpha", "version"} - set(BACKENDS) == set()
    assert ".resolved_alpha" in source


def test_recipes_need_no_torch() -> None:
    code = (
        "import sys, qlora.recipe as r; r.Recipe.load('quickstart').to_yaml(); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception:
        raise result.exception
    return result.stdout


def test_qlora_recipes_lists_and_shows() -> None:
    head, *lines = invoke("list").splitlines()
    assert head.split() == ["recipe", "needs", "fits", "from", "purpose"]
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert all(len(line) <= 160 and len(line.split()) > 3 for line in lines)
    assert invoke("show", "quickstart").startswith("# qlora train quickstart\n")
    assert invoke("show", "quickstart", "--resolved") == Recipe.load("quickstart").to_yaml()
    assert json.loads(invoke("schema")) == Recipe.json_schema()


def test_qlora_recipes_copy_overwrites_nothing(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert str(target) in invoke("copy", "llama-7b", str(target))
    assert Recipe.load(target).adapter == Recipe.load("llama-7b").adapter
    assert target.read_text().startswith(f"# qlora train {target}\n")
    target.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        invoke("copy", "llama-7b", str(target))
    assert target.read_text() == "precious"
    invoke("copy", "llama-7b", str(target), "--force")
    invoke("copy", "quickstart", str(tmp_path))
    assert Recipe.load(tmp_path / "quickstart.yaml") == Recipe.load("quickstart")
    with pytest.raises(SaveError, match=r"nowhere/x\.yaml: cannot be written: No such file"):
        invoke("copy", "quickstart", str(tmp_path / "nowhere/x.yaml"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe: not a regular file"):
        invoke("copy", "quickstart", str(tmp_path / "pipe"), "--force")
    with pytest.raises(RecipeError, match="did you mean 'llama-7b'"):
        invoke("show", "lama-7b")


def test_an_ambiguous_key_is_reported_with_both_meanings(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("traiking: {}\n")
    with pytest.raises(RecipeError, match=r"did you mean 'training' or 'tracking'|'tracking' or 'training'"):
        Recipe.load(str(file))


def test_max_steps_overrides_the_epochs() -> None:
    """max_steps wins whether it is lower or higher than the steps of the epochs."""
    training = Recipe.load("quickstart", ["training.epochs=3"]).training
    assert training.model_copy(update={"max_steps": None}).total_steps(10) == 30
    for steps in (1, 100):
        assert training.model_copy(update={"max_steps": steps}).total_steps(10) == steps


def test_an_empty_output_is_no_default() -> None:
    """As in `output=$RUN --fresh` with an unset RUN, which would replace the run of the default folder."""
    with pytest.raises(RecipeError, match="command line: output: is empty; name the folder of the run"):
        Recipe.load("quickstart", ["output="])
