"""A script's folder comes first on sys.path, so no file in it may have the name of a module that others import."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOKED_FOR = {"kernels"}
"""modules that our libraries import if they are installed, and that need not be installed here"""


def folders_of_scripts() -> list[Path]:
    """Return the root, where `python -m` and pytest start, and every folder of scripts that is not a package."""
    folders = [ROOT, ROOT / ".ci", *(each for each in ROOT.glob("benchmarks/**/") if any(each.glob("*.py")))]
    return [each for each in [*folders, ROOT / "tests"] if not (each / "__init__.py").exists()]


def modules_of_others() -> set[str]:
    installed = {name for name, owners in packages_distributions().items() if not ours(owners)}
    return {*sys.stdlib_module_names, *installed, *LOOKED_FOR}


def ours(distributions: list[str]) -> bool:
    return all("qlora" in name for name in distributions)


def names_in(folder: Path) -> set[str]:
    """Return the names of files and packages. A folder without `__init__.py` does not shadow a package."""
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem for path in folder.glob("*.py")}


def test_every_folder_with_scripts_is_checked() -> None:
    assert [str(folder.relative_to(ROOT)) for folder in folders_of_scripts()] == [
        ".", ".ci", "benchmarks", "benchmarks/null_gpu/site", "tests"
    ]  # fmt: skip


@pytest.mark.parametrize("folder", folders_of_scripts(), ids=lambda folder: folder.name)
def test_no_script_shadows_a_module(folder: Path) -> None:
    meant = {"sitecustomize"}  # Python's own hook for code at its start
    assert not names_in(folder) & modules_of_others() - meant


@pytest.mark.parametrize("shadow", ["profile.py", "kernels.py", "torch/__init__.py"])
def test_a_shadowing_file_is_detected(shadow: str, tmp_path: Path) -> None:
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert names_in(tmp_path) & modules_of_others() == {shadow.split("/")[0].removesuffix(".py")}
