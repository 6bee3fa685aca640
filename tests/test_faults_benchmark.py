"""The sweeps of benchmarks/faults: their judgement, their file of outcomes, and a few cases of each."""

import json
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.faults.__main__ import SWEEPS, main
from benchmarks.faults.child import HANG, Ended
from benchmarks.faults.sweep import Judged, Sweep, judge, run, table


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        (Ended(0, "", ""), "works"), (Ended(4, "", "qlora: run/run.json: damaged"), "named"),
        (Ended(4, "", "qlora: damaged"), "unnamed"), (Ended(HANG, "", ""), "hang"), (Ended(-9, "", ""), "killed"),
        (Ended(1, "", "Traceback (most recent call last): run.json"), "traceback"),
        (Ended(1, "", "run.json"), "exit 1"),
    ],
)  # fmt: skip
def test_the_end_of_a_command_is_judged(ended: Ended, kind: str) -> None:
    assert judge(ended, ["run.json"], "cut").kind == kind


def test_outcomes_are_kept_and_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[float] = []

    def case(rng: random.Random, folder: Path) -> Judged:
        assert list(folder.iterdir()) == []
        ran.append(rng.random())
        return Judged("named" if len(ran) < 3 else "hang", "cut")

    sweep, file = Sweep("files", "cut files", 3, lambda shared: case), tmp_path / "out.jsonl"
    assert run(sweep, range(2), file) == {"named": 2}
    with file.open("a") as stream:
        stream.write('{"sweep": "files", "ca')  # a kill
        stream.write("\n")
    assert run(sweep, range(3), file) == {"named": 2, "hang": 1}
    assert len(set(ran)) == len(ran) == 3
    assert json.loads(capsys.readouterr().out)["case"] == 2
    assert "| files | 3 | 0 | 2 | 0 | 1 |" in table({"files": run(sweep, range(3), file)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", SWEEPS)
def test_a_few_cases_of_each_sweep_are_clean(name: str, tmp_path: Path) -> None:
    try:
        assert main([name, "--cases", "20", "--out", str(tmp_path / "out.jsonl")]) == 0
    finally:
        patch.stopall()  # the sweeps leave out forecasts, for as long as their process lives
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20
