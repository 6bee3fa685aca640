"""Earlier versions: recorded recipes, plans, adapters and runs are translated; a recipe from a user is refused."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands_for_tests import qlora
from hypothesis import given
from hypothesis import strategies as st

from qlora.errors import RecipeError
from qlora.memory import advice
from qlora.model.prepare import checkpointed
from qlora.recipe import Checkpointing, Recipe
from qlora.recipe.fields import names
from qlora.recipe.versions import CHANGES, VERSION, NewerRecipe, change_of, translated
from qlora.training.run_folder import check_output, claim, earlier_plan
from qlora.training.train import train

RUNS = Path(__file__).parent / "fixtures" / "version_1"
"""runs of the bundled base from before recipes stated a version: one finished, one stopped after 2 of 4 steps"""

SMALL = "base: {model: some/model}\ndata: {source: some/data}\n"
DATA = {
    "source": "bundled/tickets/train.jsonl", "format": "messages", "max_length": 128, "limit": 24, "held_out": 4,
    "train_on": "all",
}  # fmt: skip
PLAN = {
    "micro_batch_size": 2,
    "activation_checkpointing": {"full": 3, "mlp": 1},
    "activation_offloading": False,
    "loss_chunk": 1024,
}


def expected(name: str, **training: Any) -> Recipe:
    """Return the recipe of a run in RUNS as it is written today."""
    common = {"max_steps": 4, "global_batch_size": 4, "samples": 0, "eval_every": None, "device": "cpu"}
    return Recipe.from_dict(
        {
            "base": {"model": "bundled/base", "compute_dtype": "float32"},
            "adapter": {"rank": 1, "targets": ["q_proj"]},
            "data": DATA,
            "training": common | training,
            "tracking": {"wandb": {"mode": "disabled"}},
            "output": f"runs/{name}",
        }
    )


FINISHED = expected(
    "finished",
    micro_batch_size=2,
    activation_checkpointing={"full": 1, "mlp": 2},
    activation_offloading=True,
    save_every=None,
)
INTERRUPTED = expected("interrupted", memory="7.2MiB", save_every=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a copy of the interrupted run."""
    return Path(shutil.copytree(RUNS / "interrupted", tmp_path / "run"))


# Files of earlier runs can be read


def test_recorded_recipes_have_the_keys_of_today(tmp_path: Path) -> None:
    planned = expected("interrupted", save_every=1, **PLAN)
    for file, recipe in {
        "finished/recipe.yaml": FINISHED,
        "finished/adapter/recipe.yaml": FINISHED,
        "interrupted/recipe.yaml": INTERRUPTED,
        "interrupted/checkpoints/step-000002/adapter/recipe.yaml": planned,
    }.items():
        assert Recipe.recorded(RUNS / file) == recipe
        assert Recipe.load(RUNS / file) == recipe  # as in `qlora train runs/x/recipe.yaml`
        assert recipe.to_yaml().startswith(f"version: {VERSION}\n")
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert Recipe.load(tmp_path / "again.yaml") == recipe


def test_an_adapter_of_an_earlier_version_gives_the_same_answers() -> None:
    result = json.loads((RUNS / "finished/result.json").read_text())
    found = json.loads(qlora("eval", RUNS / "finished", "--json").stdout)
    assert found["eval_loss"] == pytest.approx(result["loss_after"], rel=1e-4)
    done = qlora("generate", RUNS / "finished/adapter", "--prompt", "Hello", "--max-new-tokens", 4)
    stages = ["loading torch and transformers", "loading base and adapter"]
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("device ")] == stages
    assert done.stdout


def test_an_interrupted_run_of_an_earlier_version_can_be_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora.memory.run_memory as record

    def missing(*args: Any, **kwargs: Any) -> None:
        # The run continues without a forecast, which would take seconds; without a plan it would fail
        raise RuntimeError("planned again")

    monkeypatch.setattr(record, "architecture", missing)
    assert earlier_plan(run) == PLAN
    outcome = train(INTERRUPTED.model_copy(update={"output": str(run)}), resume=True, terminal=False)
    assert (outcome.steps, outcome.result) == (4, run / "adapter")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert json.loads((run / "run.json").read_text())["plan"] == PLAN
    assert Recipe.recorded(run / "adapter/recipe.yaml").training.activation_checkpointing == Checkpointing(
        full=3, mlp=1
    )
    assert (run / "recipe.yaml").read_text().startswith(f"version: {VERSION}\n")


@pytest.mark.parametrize("lost", ["run.json", "recipe.yaml"])
def test_a_checkpoint_of_an_earlier_version_replaces_lost_files(run: Path, lost: str) -> None:
    (run / lost).unlink()
    assert earlier_plan(run) == PLAN
    assert check_output(INTERRUPTED, run, resume=True, fresh=False)
    other = Recipe.recorded(RUNS / "interrupted/recipe.yaml", ["data.train_on=completion"])
    with pytest.raises(RecipeError, match=r"  data\.train_on: 'all' then, 'completion' now"):
        check_output(other, run, resume=True, fresh=False)


@pytest.mark.parametrize(("rate", "says"), [(0.1, True), (0.0, False)])
def test_a_resumed_run_with_another_dropout_scheme_notes_it_once(
    run: Path, caplog: pytest.LogCaptureFixture, rate: float, says: bool
) -> None:
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("dropout: 0.0", f"dropout: {rate}"))
    recipe = Recipe.recorded(file)
    for expected in (says, False):
        caplog.clear()
        claim(recipe, run, resume=True, fresh=False)
        assert ("drew dropout by micro-batch" in caplog.text) == expected


def test_a_run_is_resumed_only_with_its_settings_under_any_name() -> None:
    assert check_output(FINISHED, RUNS / "finished", resume=True, fresh=False)
    other = Recipe.recorded(RUNS / "finished/recipe.yaml", ["data.train_on=completion"])
    with pytest.raises(RecipeError, match=r"data\.train_on: 'all' then, 'completion' now"):
        check_output(other, RUNS / "finished", resume=True, fresh=False)


def before(setting: bool | int, layers: int) -> int:
    return layers * setting if isinstance(setting, bool) else min(setting, layers)


COUNTS = st.booleans() | st.integers(0, 9)


@given(COUNTS, COUNTS, st.integers(0, 9))
def test_the_same_layers_are_recomputed_as_before(whole: bool | int, mlps: bool | int, layers: int) -> None:
    settings = translated("training", {"gradient_checkpointing": whole, "mlp_checkpointing": mlps})
    assert settings.keys() == {"activation_checkpointing"}
    recipe = Recipe.from_dict({"base": {"model": "m"}, "data": {"source": "s"}, "training": settings})
    first = before(whole, layers)
    assert checkpointed(recipe, layers) == (first, min(before(mlps, layers), layers - first))


def test_changes_map_removed_keys_to_existing_keys() -> None:
    known = set(names(Recipe.json_schema()))
    for change in CHANGES:
        assert f"{change.section}.{change.new}" in known
        assert known.isdisjoint(f"{change.section}.{key}" for key in change.old)
        assert change.until < VERSION
        assert [change_of((change.section, key)) for key in change.old] == [change] * len(change.old)
    assert Recipe.from_dict({"base": {"model": "m"}, "data": {"source": "s"}}).version == VERSION


# Users are shown the new names


OLD = {
    "training: {gradient_checkpointing: true}": "activation_checkpointing: full",
    "training: {gradient_checkpointing: false}": "activation_checkpointing: none",
    "training: {gradient_checkpointing: 3}": "activation_checkpointing: {full: 3, mlp: 0}",
    "training: {mlp_checkpointing: true}": "activation_checkpointing: mlp",
    "training: {mlp_checkpointing: 2}": "activation_checkpointing: {full: 0, mlp: 2}",
    "training: {gradient_checkpointing: 3, mlp_checkpointing: 2}": "activation_checkpointing: {full: 3, mlp: 2}",
    "training: {offload: true}": "activation_offloading: true",
    "data: {source: s, loss_on: all}": "train_on: all",
}


def failure(call: Callable[[], object]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        call()
    return str(caught.value).splitlines()


@pytest.mark.parametrize("text", OLD)
@pytest.mark.parametrize("version", ["", "version: 1\n", "version: 2\n"])
def test_an_old_key_is_refused_with_its_new_name_and_value(tmp_path: Path, text: str, version: str) -> None:
    file = tmp_path / "my.yaml"
    lines = SMALL.splitlines(keepends=True)[: 1 if text.startswith("data") else 2]
    file.write_text("".join([version, *lines, text, "\n"]))
    said = failure(lambda: Recipe.load(file))
    assert len(said) == text.count("checkpointing:") or len(said) == 1
    new = ("data." if text.startswith("data") else "training.") + OLD[text].partition(":")[0]
    for line in said:
        assert line.endswith(f": is now {new}; write `{OLD[text]}`")
        assert line.startswith(f"{file}:{len(lines) + 1 + bool(version)}:")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.gradient_checkpointing=false", "write `training.activation_checkpointing=none`"),
        ("training.mlp_checkpointing=2", "write `'training.activation_checkpointing={full: 0, mlp: 2}'`"),
        ("training.offload=true", "write `training.activation_offloading=true`"),
        ("data.loss_on=all", "write `data.train_on=all`"),
        ("data.loss_on=some", "is now data.train_on, which must be completion or all"),
        (
            "training.gradient_checkpointing=-1",
            "is now training.activation_checkpointing, which must be none, mlp, full or a mapping with the keys",
        ),
        ("gradient_checkpointing=true", "unknown key; did you mean 'training.activation_checkpointing'?"),
        ("training.loss_on=all", "unknown key; did you mean 'data.train_on'?"),
    ],
)
def test_an_old_key_on_the_command_line_is_refused_too(tmp_path: Path, override: str, text: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(SMALL)
    for recipe in (file, RUNS / "finished/recipe.yaml"):  # the second one is translated to new keys
        [said] = failure(lambda recipe=recipe: Recipe.load(recipe, [override]))
        assert said.startswith(f"command line: {override.partition('=')[0]}: ")
        assert text in said


def test_an_old_key_from_python_is_refused_too() -> None:
    settings = {"base": {"model": "m"}, "data": {"source": "s", "loss_on": "all"}}
    [said] = failure(lambda: Recipe.from_dict(settings))
    assert said == "recipe: data.loss_on: is now data.train_on; write `train_on: all`"


def test_an_old_key_next_to_the_new_one_must_be_removed() -> None:
    settings = {"base": {"model": "m"}, "data": {"source": "s", "loss_on": "all", "train_on": "completion"}}
    [said] = failure(lambda: Recipe.from_dict(settings))
    assert (
        said
        == "recipe: data.loss_on: is now data.train_on, which this recipe also sets; leave the old key out"
    )


# The version of a recipe


def test_a_recipe_in_a_run_has_the_version_that_it_states(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    file = tmp_path / "recipe.yaml"
    for version, ours in {"": True, "version: 1\n": True, "version: 2\n": False}.items():
        file.write_text(f"{version}{SMALL}training: {{gradient_checkpointing: 3}}\n")
        for read in (Recipe.load, Recipe.recorded):
            if ours:
                assert read(file).training.activation_checkpointing == Checkpointing(full=3)
                assert read(file).version == VERSION
            else:
                assert "is now training.activation_checkpointing" in failure(lambda read=read: read(file))[0]


def test_a_newer_recipe_is_refused_and_not_called_damaged(run: Path) -> None:
    file = run / "recipe.yaml"
    file.write_text(INTERRUPTED.to_yaml().replace("version: 2", "version: 3") + "colour: blue\n")
    text = r"version: 3 was written by a newer qlora, and this one reads versions up to 2; update qlora$"
    calls: list[Callable[[], object]] = [
        lambda: Recipe.load(file),
        lambda: Recipe.recorded(file),
        lambda: check_output(INTERRUPTED, run, resume=True, fresh=False),
        lambda: Recipe.from_dict({"version": 3}),
    ]
    for call in calls:
        with pytest.raises(NewerRecipe, match=text):
            call()


@pytest.mark.parametrize("version", ["0", "-1", "true", "'2'", "2.5", "null", "[2]"])
def test_an_impossible_version_is_refused(tmp_path: Path, version: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"version: {version}\n{SMALL}")
    for read in (Recipe.load, Recipe.recorded):
        [said] = failure(lambda read=read: read(file))
        assert said.startswith(f"{file}:1:1: version: must be 2 (you wrote ")


# The new key on the command line and in advice


@pytest.mark.parametrize("written", ["", "none", "full", "{mlp: 5}"])
def test_layers_to_recompute_are_set_on_the_command_line(tmp_path: Path, written: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"{SMALL}training: {{activation_checkpointing: {written}}}\n" if written else SMALL)
    key = "training.activation_checkpointing"
    mlp = 5 if written.startswith("{") else 0
    for overrides, value in {
        (f"{key}=mlp",): "mlp",
        (f"{key}={{full: 3, mlp: 2}}",): Checkpointing(full=3, mlp=2),
        (f"{key}.full=3",): Checkpointing(full=3, mlp=mlp),
        (f"{key}=none", f"{key}.mlp=2", f"{key}.full=1"): Checkpointing(full=1, mlp=2),
    }.items():
        assert Recipe.load(file, overrides).training.activation_checkpointing == value
    [said] = failure(lambda: Recipe.load(file, [f"{key}.layers=3"]))
    assert said == f"command line: {key}.layers: unknown key; {key} has the keys full, mlp"


@pytest.mark.parametrize(
    ("setting", "advised"),
    [
        ("none", ["=mlp", "=full"]),
        ({"mlp": 2}, ["=mlp", "=full"]),
        ("mlp", ["=full"]),
        ({"full": 2, "mlp": 1}, [".mlp=4", "=full"]),
        ({"full": 2, "mlp": 4}, ["=full"]),
        ("full", []),
        ({"full": 6}, []),
    ],
)
def test_the_advised_setting_recomputes_more(setting: Any, advised: list[str]) -> None:
    arch: Any = SimpleNamespace(layers=6, recomputed=(1.0, 0.5))
    settings = {"base": {"model": "m"}, "data": {"source": "s"}}
    recipe = Recipe.from_dict({**settings, "training": {"activation_checkpointing": setting}})
    found = list(advice._checkpointing(recipe, arch))
    assert [text for _, text in found] == [f"training.activation_checkpointing{end}" for end in advised]
    counts = [checkpointed(one, 6) for one in (recipe, *(changed for changed, _ in found))]
    assert all(2 * less[0] + less[1] < 2 * more[0] + more[1] for less, more in pairwise(counts))
