"""The examples of docs/guides/any-network.md run, and the page lists each of them with the line that it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from examples_for_tests import ROOT

EXAMPLES = sorted(set((ROOT / "docs/examples").glob("*.py")) - {ROOT / "docs/examples/exact_match.py"})
PAGE = (ROOT / "docs/guides/any-network.md").read_text()


def words(line: str) -> str:
    """Return a line without its numbers, which differ a little between machines."""
    return re.sub(r"\d[\d.e%+-]*", "#", line)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_page_lists_the_example(file: Path) -> None:
    assert f"](../examples/{file.name})" in PAGE


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_example_learns(file: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert words(last) in words(PAGE), last
