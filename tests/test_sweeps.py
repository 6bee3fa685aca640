"""The sweeps of docs/guides/sweeps.md: the loop in the shell, and the command that an agent of W&B builds."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import qlora
from examples_for_tests import ROOT, SHORT, blocks

from qlora.recipe import Recipe
from qlora.tracking.wandb import run_id

PAGE = ROOT / "docs/guides/sweeps.md"


def file_of(title: str) -> str:
    (block,) = [block for block in blocks(PAGE) if block.title == title]
    return block.text


def program(folder: Path, script: str) -> dict[str, str]:
    """Put a program `qlora` into `folder`; return an environment that finds it first."""
    (folder / "bin").mkdir()
    (folder / "bin/qlora").write_text(script)
    (folder / "bin/qlora").chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def run_script(folder: Path, environment: dict[str, str]) -> int:
    (folder / "sweep.sh").write_text(file_of("sweep.sh"))
    done = subprocess.run(["bash", "sweep.sh"], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode


RECORDER = """#!/bin/sh
echo "$*" >> commands
[ "$1" = train ] && echo '{"loss_after": 1.0}'
case "$*" in *rank=4*) exit CODE; esac
mkdir -p runs/sweep/a
"""


@pytest.mark.parametrize(("code", "runs"), [(0, 4), (5, 4), (130, 1), (143, 1)])
def test_the_loop_passes_settings_and_ends_only_at_a_signal(tmp_path: Path, code: int, runs: int) -> None:
    ended = run_script(tmp_path, program(tmp_path, RECORDER.replace("CODE", str(code))))
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    trained = [command[1:] for command in commands if command[0] == "train"]
    assert len(trained) == runs
    if code >= 128:
        assert ended == 1
        return
    assert ended == 0
    recipes = [Recipe.load(name, overrides[:-2]) for name, *overrides in trained]
    assert [(r.optimizer.lr, r.adapter.rank) for r in recipes] == [
        (0.001, 4), (0.001, 16), (0.002, 4), (0.002, 16),
    ]  # fmt: skip
    assert len({r.output for r in recipes}) == 4
    assert all(command[-2:] == ["--resume", "--json"] for command in trained)
    assert commands[-1] == ["compare", "runs/sweep/a", "--picture", "sweep.png"]
    written = [json.loads(file.read_text()) for file in (tmp_path / "outcomes").iterdir()]
    assert written == [{"loss_after": 1.0}] * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loop_trains_and_compares(tmp_path: Path) -> None:
    short = shlex.join(SHORT)
    script = f'#!/bin/sh\n[ $1 = train ] && set -- "$@" {short}\nexec {sys.executable} -m qlora "$@"\n'
    environment = program(tmp_path, script)
    assert run_script(tmp_path, environment) == 0
    picture = (tmp_path / "sweep.png").read_bytes()
    (tmp_path / "sweep.png").unlink()
    assert run_script(tmp_path, environment) == 0, "started again, the loop finds finished runs"
    assert (tmp_path / "sweep.png").read_bytes() == picture
    found = json.loads(qlora("compare", *sorted(tmp_path.glob("runs/sweep/*")), "--json").stdout)
    assert set(found["keys"]) == {"optimizer.lr", "adapter.rank"}
    losses = [json.loads(file.read_text())["loss_after"] for file in sorted(tmp_path.glob("outcomes/*"))]
    assert [run["loss"] for run in found["runs"]] == losses
    assert found["comparable"]


def agents_command(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], dict[str, str]]:
    """Let W&B's agent build the command of a run with these values of the parameters; nothing is started."""
    import wandb.wandb_agent as agents
    import yaml  # a requirement of wandb, which reads the file with it

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        agents, "AgentProcess", lambda **how: started.append(how) or type("Process", (), {})()
    )
    config = yaml.safe_load(file_of("sweep.yaml"))
    assert set(values) <= set(config["parameters"])
    agent = object.__new__(agents.Agent)
    vars(agent).update(
        _sweep_command=config["command"], _function=None, _in_jupyter=False, _run_processes={},
        _forward_signals=False,
    )  # fmt: skip
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "abcd1234", "program": config["program"], "args": arguments})
    return started[0]["command"], started[0]["env"]


def test_the_command_that_an_agent_builds_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_forecast: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "of the run before")
    command, environment = agents_command({"optimizer.lr": 0.0021354, "adapter.rank": 8}, monkeypatch)
    environment |= program(tmp_path, '#!/bin/sh\nfor word; do echo "$word"; done\n')
    environment["WANDB_RUN_ID"] = os.environ["WANDB_RUN_ID"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    verb, *arguments = done.stdout.splitlines()
    assert verb == "train"
    recipe = Recipe.load(arguments[0], arguments[1:])
    assert (recipe.optimizer.lr, recipe.adapter.rank) == (0.0021354, 8)
    assert recipe.output == "runs/sweep/abcd1234"
    checked = qlora("check", *arguments, *SHORT)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("OK")


def test_a_run_of_a_sweep_keeps_the_id_that_the_sweep_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")
    assert run_id(tmp_path / "alone") != "abcd1234", "a variable that is left of something else"
    monkeypatch.setenv("WANDB_SWEEP_ID", "wxyz9876")
    assert run_id(tmp_path / "swept") == "abcd1234"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert run_id(tmp_path / "swept") == "abcd1234", "resumed without the agent"


def test_values_that_python_writes_are_overrides() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    values = {
        "adapter.targets": ["q_proj", "v_proj"], "data.packing": True, "optimizer.lr": 1e-05,
        "training.max_steps": 300,
    }  # fmt: skip
    built = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    recipe = Recipe.load("quickstart", built["args_no_hyphens"])
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert (recipe.data.packing, recipe.optimizer.lr, recipe.training.max_steps) == (True, 1e-05, 300)
