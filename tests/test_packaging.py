"""Requirements in pyproject.toml and the contents of a release."""

import re
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from commands_for_tests import qlora
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()

CALLED_DEEPLY = {
    "torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors", "huggingface_hub", "typer",
    "wandb", "peft", "trl", "triton",
}  # fmt: skip
"""Libraries whose minor releases have broken us, or can break us: their upper bound is the next minor release."""

SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Arguments for unpacking an archive: Python has the filter since 3.11.4."""


def others(lines: list[str]) -> list[Requirement]:
    """Return the requirements without those on the package itself, which have no version."""
    return [wanted for line in lines if (wanted := Requirement(line)).name != PROJECT["name"]]


def requirements() -> list[Requirement]:
    return others(sum(EXTRAS.values(), PYPROJECT["build-system"]["requires"] + PROJECT["dependencies"]))


def bound(wanted: Requirement, operator: str) -> Version:
    (found,) = (clause.version for clause in wanted.specifier if clause.operator == operator)
    return Version(found)


@pytest.mark.parametrize("wanted", requirements(), ids=lambda wanted: wanted.name)
def test_every_dependency_has_a_close_upper_bound(wanted: Requirement) -> None:
    upper = bound(wanted, "<")
    by_minor = wanted.name in CALLED_DEEPLY or upper.major == 0
    assert len(upper.release) == (2 if by_minor else 1), f"{wanted}"


@pytest.mark.parametrize("wanted", requirements(), ids=lambda wanted: wanted.name)
def test_the_installed_versions_are_within_the_bounds(wanted: Requirement) -> None:
    """`.ci/newest` deselects this test by its name."""
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:
        pytest.skip("not installed")
    assert wanted.specifier.contains(installed, prereleases=True), f"{installed} is not {wanted.specifier}"


def ask(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / ".ci/requirements.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_oldest_pins_every_dependency_to_its_lower_bound() -> None:
    wanted = others(PROJECT["dependencies"])
    lines = [Requirement(line) for line in ask("oldest")]
    assert [line.name for line in lines] == [each.name for each in wanted]
    for line, each in zip(lines, wanted, strict=True):
        lowest = bound(each, ">=")
        assert line.specifier.contains(lowest)
        assert each.specifier.contains(lowest)


def test_newest_unpins_every_dependency_except_the_held_ones() -> None:
    wanted = others(PROJECT["dependencies"] + EXTRAS["docs"] + EXTRAS["test"])
    lines = [Requirement(line) for line in ask("newest", "--hold", "torch", "--hold", "huggingface-hub")]
    assert [line.name for line in lines] == [each.name for each in wanted]
    for line, each in zip(lines, wanted, strict=True):
        held = each.name in {"torch", "huggingface_hub"}
        assert line.specifier.contains(bound(each, "<")) != held
        assert not line.specifier.contains("0.0.1")
        assert line.marker == each.marker


def test_newest_refuses_to_hold_an_unneeded_package() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        ask("newest", "--hold", "tortch")
    assert "does not ask for tortch" in refused.value.stderr


def test_newest_deselects_an_existing_test() -> None:
    assert test_the_installed_versions_are_within_the_bounds.__name__ in (ROOT / ".ci/newest").read_text()


def test_tested_pins_every_package_that_is_needed_to_the_installed_release() -> None:
    lines = {line.name: line for line in map(Requirement, filter(is_pin, ask("tested")))}
    for wanted in others(PROJECT["dependencies"]):
        pin = str(lines[canonicalize_name(wanted.name)].specifier)
        assert pin == f"=={Version(version(wanted.name)).public}"
    assert lines.keys() >= {"tokenizers", "markupsafe"}, "packages that the dependencies need"
    assert "pytest" not in lines


def test_the_constraints_file_is_within_the_bounds() -> None:
    pins = {line.name: line for line in map(Requirement, filter(is_pin, CONSTRAINTS.splitlines()))}
    for wanted in others(PROJECT["dependencies"]):
        assert wanted.specifier.contains(bound(pins[canonicalize_name(wanted.name)], "=="))


def is_pin(line: str) -> bool:
    return not line.startswith("#")


# what a release holds


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist and the wheel of this checkout into a folder."""
    pytest.importorskip("hatchling")
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def build(root: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return folder


def wheel(folder: Path) -> Path:
    (found,) = folder.glob("qlora_train-*.whl")
    return found


def test_a_wheel_holds_every_file_of_the_package_and_the_recipes(release: Path) -> None:
    package, recipes = ROOT / "qlora", ROOT / "recipes"
    expected = {f"qlora/_recipes/{file.name}" for file in recipes.iterdir()} | {
        str(file.relative_to(ROOT))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with ZipFile(wheel(release)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {Path(name).suffix for name in names} >= {".css", ".js", ".j2", ".jinja", ".jsonl", ".safetensors"}
    assert {"qlora/py.typed", "qlora/_recipes/quickstart.yaml"} <= names


def test_the_sdist_builds_the_same_wheel(release: Path, tmp_path: Path) -> None:
    (source,) = release.glob("qlora_train-*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, **SAFELY)
    again = build(tmp_path / source.name.removesuffix(".tar.gz"), tmp_path / "dist")
    assert wheel(again).read_bytes() == wheel(release).read_bytes()


@pytest.mark.parametrize("installed", ["1.2.3", None])
def test_the_command_prints_the_version(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return {PROJECT["name"]: installed}[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    done = qlora("--version")
    assert (done.returncode, done.stderr) == (0, "")
    version_shown = re.escape(installed or "unknown (not installed)")
    assert re.fullmatch(rf"qlora-train {version_shown}( \(commit \w+(, changed)?\))?\n", done.stdout)


def test_the_version_is_printed_before_anything_large_is_imported() -> None:
    code = (
        "import sys; from qlora.cli import app; app(['--version'], standalone_mode=False); "
        "print({'torch', 'transformers', 'pydantic', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.fullmatch(r"qlora-train .+\nset\(\)\n", done.stdout)


def test_nothing_asks_for_the_version_of_the_other_qlora() -> None:
    """`qlora` on the package index is somebody else's: its version would not be ours."""
    asked = [path for path in ROOT.glob("qlora/**/*.py") if re.search(r"version\(.qlora", path.read_text())]
    assert not asked
    assert PROJECT["name"] == "qlora-train"
    assert PROJECT["scripts"] == {"qlora": "qlora.__main__:main"}
