"""The sweeps of benchmarks/faults: their judgement, their file of outcomes, and a few cases of each."""

import json
import random
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import architectures_for_tests as small
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.faults import architectures
from benchmarks.faults.__main__ import SWEEPS, main
from benchmarks.faults.child import HANG, Ended
from benchmarks.faults.sweep import Judged, Sweep, judge, run, table
from qlora import bundled


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


def test_a_refused_training_contradicts_its_estimate() -> None:
    works, refused = ({"kind": kind, "said": "qlora: x"} for kind in ("works", "refused"))
    assert architectures.contradicted(refused, works)["kind"] == "fault"
    assert architectures.contradicted(refused, refused)["kind"] == "refused"
    assert architectures.contradicted(works, works)["kind"] == "works"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("qlora: base.model: damaged", True), ("qlora: no forecast for DbrxForCausalLM", True),
        ("qlora: config.json is cut", True), ("qlora: model.layers.0.mlp.up_proj has no weight", True),
        ("qlora: o_proj has no weight", True), ("qlora: something failed", False), ("qlora: Failed. Try it.", False),
    ],
)  # fmt: skip
def test_a_refusal_has_a_name(
    message: str, named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(architectures, "command", lambda arguments, seconds: Ended(4, "", message))
    line = architectures._case("llama", "check", [], tmp_path, 1.0)
    assert line["kind"] == ("refused" if named else "fault")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_all_commands_work_on_a_model_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "llama"
    small.config("llama", vocab_size=2048).save_pretrained(folder)
    AutoModelForCausalLM.from_config(small.config("llama", vocab_size=2048)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("bundled/base") / file, folder)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["sweep", "--models", str(folder.parent), "--out", str(out)])
    assert architectures.main() == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line for line in lines if line["kind"] != "works"] == []
    assert {"estimate", "train nf4", "merge nf4 nf4", "load none original"} <= {
        line["case"] for line in lines
    }
