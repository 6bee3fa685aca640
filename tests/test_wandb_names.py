"""Names that are too long for Weights & Biases are named by `qlora check` and before a run, not lost while it runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import qlora
from runs_for_tests import stop_after

from qlora.recipe import Recipe
from qlora.recipe.tracking import Wandb
from qlora.tracking.wandb import run_name
from qlora.tracking.wandb_names import NOT_IN_PROJECTS, TAG_LIMIT, VARIABLES, check_names
from qlora.training.train import train

RecipeFile = Callable[..., Path]


def section(**settings: Any) -> Wandb:
    return Wandb.model_validate({"mode": "offline", **settings}, strict=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"project": "p" * 129},
            "tracking.wandb.project: 'pppp.* … has 129 characters, and .* takes 128; shorten",
        ),
        ({"project": "a/b:c"}, "tracking.wandb.project: 'a/b:c' has / :, and a project of"),
        ({"name": "n" * 129}, "tracking.wandb.name: 'nnnn.* … has 129 characters, and .* takes 128; shorten"),
        (
            {"tags": ["a", "t" * 65]},
            r"tracking.wandb.tags\[1\]: 'tttt.* … has 65 characters, and .* takes 64",
        ),
    ],
)
def test_check_and_the_start_of_a_run_name_the_key_and_the_limit(
    recipe_file: RecipeFile, wrong: dict[str, Any], said: str
) -> None:
    file = recipe_file(tracking={"wandb": {"mode": "offline", **wrong}})
    for command in ("check", "train"):
        done = qlora(command, file)
        assert done.returncode == 2
        assert done.stdout == ""
        (problem,) = check_names(section(**wrong), Path("run"), resume=True)
        assert re.match(said, problem)
        assert f"qlora: {problem}" in done.stderr
    assert not Path(Recipe.load(file).output).exists()
    assert check_names(section(mode="disabled", **wrong), Path("run")) == []


def test_wandb_itself_refuses_what_is_refused_and_takes_what_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    for limit, key, value in ((128, "project", "p"), (TAG_LIMIT, "run_tags", "t")):
        text = value * limit
        wandb.Settings(**{key: text if key == "project" else [text]})
        with pytest.raises((ValueError, wandb.errors.UsageError), match=r"128|64"):
            wandb.Settings(**{key: text + value if key == "project" else [text + value]})
    for character in NOT_IN_PROJECTS:
        with pytest.raises((ValueError, wandb.errors.UsageError), match="cannot contain"):
            wandb.Settings(project=f"a{character}")
    good = section(project="p" * 128, name="n" * 128, tags=["t" * 64])
    assert check_names(good, Path("run")) == []
    for variable, limit in VARIABLES.items():
        monkeypatch.setenv(variable, "g" * limit)
        assert check_names(good, Path("run")) == []
        monkeypatch.setenv(variable, "g" * (limit + 1))
        with pytest.raises(ValueError, match=f"{variable}: 'gggg.* has {limit + 1} characters"):
            check_names(good, Path("run"))
        monkeypatch.delenv(variable)


def test_a_folder_s_name_is_cut_and_that_is_noted() -> None:
    run = Path("r" * 130)
    assert run_name(section(), run) == "r" * 128
    (note,) = check_names(section(), run)
    assert note.startswith("tracking.wandb.name: the folder's name has 130 characters, and")
    assert check_names(section(name="short"), run) == []
    assert run_name(section(name="short"), run) == "short"


@pytest.mark.slow
@pytest.mark.usefixtures("without_forecast")
def test_a_run_that_exists_resumes_with_a_note(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(training={"max_steps": 2})
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        train(Recipe.load(file), terminal=False)
    monkeypatch.setattr("qlora.tracking.wandb.Wandb", lambda *_: None)
    recipe = Recipe.load(file, ["tracking.wandb.mode=offline", f"tracking.wandb.name={'n' * 129}"])
    train(recipe, resume=True)
    assert "note           tracking.wandb.name: 'nnnn" in capfd.readouterr().err
