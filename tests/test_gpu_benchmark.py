"""The record of a GPU: every line is kept at once, whatever an item does, and the next item follows."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as record
from benchmarks.gpu.items import ITEMS, Item
from benchmarks.gpu.peers import absent
from benchmarks.gpu.work import cut
from benchmarks.speed.workload import Document

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Program(Item):
    """An item that runs a piece of Python."""

    code: str = ""

    @property
    def command(self) -> list[str]:
        return ["-c", self.code]


def program(name: str, code: str) -> Program:
    return Program(name, "", 1, "", f"import json, os, sys, time\n{code}")


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


WORKS = program("works", "print(json.dumps({'rate': 1}))")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(json.dumps({'rate': 2}), flush=True); time.sleep(60)", "not done after 2 s"),
        ("print(json.dumps({'rate': 2})); print('why', file=sys.stderr); sys.exit(3)", "exit code 3"),
        ("print(json.dumps({'rate': 2}), flush=True); os.kill(os.getpid(), 9)", "exit code -9"),
    ],
    ids=["hangs", "fails", "killed"],
)
def test_an_item_that_fails_keeps_its_lines_and_the_next_follows(
    code: str, error: str, tmp_path: Path
) -> None:
    assert not record.run(program("breaks", code), [], tmp_path, 2.0)
    assert record.run(WORKS, [], tmp_path, 20.0)
    first, second, third, fourth = lines_of(tmp_path)
    assert first == {"item": "breaks", "rate": 2}
    assert second["error"] == error
    assert second["stderr"] == (["why"] if "why" in code else [])
    assert third == {"item": "works", "rate": 1}
    assert "error" not in fourth


def test_an_error_among_the_lines_is_a_failure(tmp_path: Path) -> None:
    assert not record.run(program("warns", "print(json.dumps({'error': 'no'}))"), [], tmp_path, 20.0)
    assert not record.run(program("talks", "print('hello')"), [], tmp_path, 20.0)
    assert [line.get("error") for line in lines_of(tmp_path)] == ["no", None, "no JSON: hello", None]


def test_no_item_begins_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--minutes", "0"])
    assert record.main() == 0
    assert [line["item"] for line in lines_of(tmp_path)] == [item.name for item in ITEMS]
    assert all("are left" in str(line["skipped"]) for line in lines_of(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu", "--list"])
    record.main()
    shown = capsys.readouterr().out
    assert all(item.name in shown for item in ITEMS)
    assert sum(item.seconds for item in ITEMS) <= 7.5 * 60


def test_documents_are_cut_into_pieces_of_different_lengths() -> None:
    document = Document(torch.arange(4096), torch.arange(4096))
    pieces = cut([document], 6)
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), document.input_ids)
    assert len({len(piece.input_ids) for piece in pieces}) == 6
    assert all(piece.labels[0] == -100 and piece.labels[1] == piece.input_ids[1] for piece in pieces)
    assert torch.equal(document.labels, torch.arange(4096))


def test_a_peer_that_is_absent_is_no_failure() -> None:
    assert absent("not installed: unsloth", missing=True)
    assert absent(
        "ImportError: You have set `use_liger_kernel` but liger-kernel is not available", missing=False
    )
    assert not absent("RuntimeError: shapes differ", missing=False)


@pytest.mark.slow
def test_every_item_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    run = subprocess.run(
        [*command, "--cache", str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, (tmp_path / "gpu.jsonl").read_text() + run.stderr
    lines = lines_of(tmp_path)
    assert {line["item"] for line in lines} == {item.name for item in ITEMS}
    assert not any("error" in line or "skipped" in line for line in lines)
    forms = [line for line in lines if "step_s" in line and line["item"] == "ours"]
    assert len(forms) == 10
    assert all("scaled_dot_product" in str(form["attention"]) for form in forms)


@pytest.mark.slow
def test_a_record_that_is_killed_keeps_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    process = subprocess.Popen([*command, "--only", "ceilings", "kernels"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "gpu.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lines_of(tmp_path)[0]["item"] == "ceilings"
