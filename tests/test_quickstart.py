"""The README's first command learns its task, and the check of its answers detects a wrong one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quickstart_for_tests import wrong_answers

RIGHT = {"prompt": "My lamp broke.", "reference": "team: repair", "answer": " team: repair\n"}
WRONG = {**RIGHT, "answer": "team: repair; team: repair"}


def metrics(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_answers_of_the_last_step_decide(tmp_path: Path) -> None:
    before, loss = {"step": 0, "samples": [WRONG]}, {"step": 8, "eval_loss": 0.1}
    run = metrics(tmp_path, before, loss, {"step": 8, "samples": [RIGHT]})
    assert wrong_answers(run) == []
    run = metrics(tmp_path, before, loss, {"step": 8, "samples": [RIGHT, WRONG]})
    (line,) = wrong_answers(run)
    assert line == ("'My lamp broke.': expected 'team: repair', answered 'team: repair; team: repair'")


@pytest.mark.parametrize("last", [{"step": 9, "loss": 1.0}, {"step": 9, "samples": []}])
def test_a_run_without_answers_at_its_end_fails_the_check(tmp_path: Path, last: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="step 9 has no samples"):
        wrong_answers(metrics(tmp_path, {"step": 8, "samples": [RIGHT]}, last))


@pytest.mark.parametrize(("sample", "code"), [(RIGHT, 0), (WRONG, 1)])
def test_the_command_of_the_check_fails_on_a_wrong_answer(
    tmp_path: Path, sample: dict[str, str], code: int
) -> None:
    run = metrics(tmp_path, {"step": 1, "samples": [sample]})
    script = Path(__file__).with_name("quickstart_for_tests.py")
    done = subprocess.run([sys.executable, str(script), str(run)], capture_output=True, text=True)
    assert done.returncode == code
    assert ("wrong answers" in done.stderr) == bool(code)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_learns_and_answers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "qlora", "train", "quickstart", f"output={run}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["loss_after"] < 0.1
    assert wrong_answers(run) == []
