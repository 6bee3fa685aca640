"""`qlora env`, `-h` of every command, and the completion of a shell."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands_for_tests import qlora

from qlora.cli import app
from qlora.runtime import device, environment


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_env_shows_versions_and_accounts_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-forty-characters")
    monkeypatch.delenv("WANDB_MODE")
    shown = qlora("env")
    assert shown.returncode == 0, shown.stderr
    for words in (
        "python",
        "torch",
        "transformers",
        "CPU",
        "auto is",
        "hub cache",
        "an API key is configured",
    ):
        assert words in shown.stdout
    done = qlora("env", "--json")
    facts = json.loads(done.stdout)
    assert facts["versions"]["python"].count(".") == 2
    assert facts["compute_dtype"]["auto"] in ("bfloat16", "float32")
    assert "secret" not in shown.stdout + shown.stderr + done.stdout + done.stderr


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_automatic_dtype_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool, dtype: str
) -> None:
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device.automatic_dtype()[0] == dtype


def test_the_version_names_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "qlora"
    package.mkdir()
    monkeypatch.setattr(environment, "PACKAGE", package)
    assert "commit" not in environment.package_version()
    (package / "file.py").write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    clean = environment.package_version()
    assert "(commit " in clean
    assert "changed" not in clean
    (package / "file.py").write_text("2")
    assert environment.package_version() == clean.replace(")", ", changed)")


def test_the_drivers_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert environment.driver_version() == "550.54.15"


def test_every_command_knows_h() -> None:
    paths = list(commands(typer.main.get_command(app)))
    assert len(paths) > 15
    for path in paths:
        done = qlora(*path, "-h")
        assert done.returncode == 0, path
        assert "Usage:" in done.stdout, path


def test_shells_complete_commands() -> None:
    assert "--install-completion" in qlora("--help").stdout
