"""Tracking: the record is always complete, and its display is right and harmless."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora.errors import SaveError
from qlora.recipe import Tracking
from qlora.tracking import BACKENDS, Sample, Tracker
from qlora.tracking.backend import Backend, Run
from qlora.tracking.record import Record
from qlora.tracking.sink import Metrics, Sink
from qlora.tracking.terminal import Bar, Lines, Pace, one_line
from qlora.training.run_folder import CONTENTS, NAME_PATTERNS

SAMPLE = Sample(prompt="Send two red lamps.", reference="lamp 2 red", answer="lamp 2 red\n")


def step(number: int, **more: Any) -> dict[str, Any]:
    numbers = {"loss": 2.5 / number, "lr": 2e-4, "grad_norm": 0.7, "tokens_per_second": 12345.6}
    return {"step": number, **numbers, "tokens": 900, "supervised_tokens": 300, **more}


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "eval_loss": loss, "eval_tokens": 1000}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The record


@contextmanager
def recording(path: Path, resume_step: int = 0) -> Iterator[Record]:
    record = Record(path, resume_step)
    yield record
    record.finish({})


def test_every_line_is_in_the_file_as_soon_as_the_call_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with recording(path) as record:
        record.evaluation(evaluation(0, 3.0))
        record.samples([SAMPLE], 0)
        record.samples([], 0)
        for number in (1, 2):
            record.step(step(number))
            assert lines(path)[-1] == step(number)
    first, second, *rest = lines(path)
    assert first == evaluation(0, 3.0)
    answers = {"prompt": "Send two red lamps.", "reference": "lamp 2 red", "answer": "lamp 2 red\n"}
    assert second == {"step": 0, "samples": [answers]}
    assert len(rest) == 2


def test_non_finite_numbers_are_recorded_as_text(tmp_path: Path) -> None:
    with recording(tmp_path / "metrics.jsonl") as record:
        record.step(step(1, loss=math.nan, grad_norm=math.inf))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert math.isnan(float(line["loss"]))
    assert float(line["grad_norm"]) == math.inf
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # NaN is not valid JSON


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with recording(path) as record:
        for number in range(1, 6):
            record.step(step(number))
            record.evaluation(evaluation(number, 1.0))
    with path.open("a") as file:
        file.write('{"step": 6, "loss": 1.')  # cut off by a kill
    with recording(path, resume_step=3) as resumed:
        assert [line["step"] for line in lines(path)] == [1, 1, 2, 2, 3, 3]
        resumed.step(step(4))
    assert [line["step"] for line in lines(path)][-2:] == [3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "broken", ['{"step": 2', '{"step": 2}', "[]\n", '{"note": 1}\n', '{"step": "2"}\n', "\0\0\0\n"]
)
def test_a_partial_line_after_a_kill_or_a_power_cut_is_removed(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken)
    with recording(path, resume_step=5):
        assert path.read_text() == '{"step": 1}\n'


def test_a_new_run_begins_an_empty_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval_loss": 3.0}\n')
    with recording(path):
        assert path.read_text() == ""


FULL_DISK = """
import resource, sys
from pathlib import Path
from qlora.errors import SaveError
from qlora.tracking.record import Record
path = Path(sys.argv[1]) / "metrics.jsonl"
record = Record(path)
for number in range(1, 51):
    full = 10 <= number < 20 or number >= int(sys.argv[2])
    room = path.stat().st_size + 15 if full else 1_000_000  # 15 bytes of the next line still fit
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    record.step({"step": number, "loss": 1.0})
try:
    record.finish({})
except SaveError as error:
    print(error)
"""


@pytest.mark.parametrize("never_again", [99, 40])
def test_lines_without_disk_space_are_written_later_or_reported_at_the_end(
    tmp_path: Path, never_again: int
) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(never_again)]
    output = subprocess.check_output(command, text=True)
    written = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    if never_again == 99:
        assert (written, output) == (list(range(1, 51)), "")
    else:
        assert written == list(range(1, 40))
        assert output == f"cannot write {tmp_path}/metrics.jsonl: File too large\n"


def test_a_record_that_cannot_be_opened_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(SaveError, match=r"cannot write .*metrics\.jsonl"):
        Record(tmp_path / "metrics.jsonl")


# The terminal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_time_left_is_estimated_after_the_first_step() -> None:
    clock = Clock()
    pace = Pace(total_steps=104, first_step=100, clock=clock)
    clock.now = 1000.0  # loading and evaluation do not count as time of the steps
    assert pace.time_left(101) == ""
    clock.now += 65.0
    assert pace.time_left(102) == "2:10 left"
    clock.now += 2 * 3600
    assert pace.time_left(103) == "1:00:32 left"


def test_a_log_gets_a_line_from_time_to_time_and_the_last_one() -> None:
    clock, file = Clock(), io.StringIO()
    sink = Lines(Console(file=file, width=60), Pace(100, clock=clock))
    for number in range(1, 101):
        clock.now += 0.5
        sink.step(step(number))
    printed = file.getvalue().splitlines()
    assert len(printed) == 11
    assert printed[0] == "step 1/100  loss 2.5000  lr 2.0e-04  12,346 tok/s"
    assert printed[1] == "step 11/100  loss 0.2273  lr 2.0e-04  12,346 tok/s  0:44 left"
    assert printed[-1].startswith("step 100/100  loss 0.0250")
    sink.step(step(100, aux_loss=2.03125))
    assert "step 100/100  loss 0.0250  aux_loss 2.0312  lr" in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_the_bar_shows_progress_below_and_everything_else_above() -> None:
    clock, file = Clock(), io.StringIO()
    sink = Bar(Console(file=file, width=100, force_terminal=True), Pace(40, clock=clock))
    sink.evaluation(evaluation(0, 2.9123))
    for number in (1, 2, 3):
        clock.now += 2.0
        sink.step(step(number))
    sink.progress.refresh()
    assert "3/40 loss 0.8333  lr 2.0e-04  12,346 tok/s 1:14 left" in plain(file.getvalue())
    sink.evaluation(evaluation(3, 1.5))
    sink.samples([SAMPLE], 3)
    sink.note("a note")
    sink.finish({})
    text = plain(file.getvalue())
    for expected in (
        "step 0  held-out loss 2.9123\n",
        "step 3  held-out loss 1.5000  (2.9123 at step 0)\n",
        "  prompt    Send two red lamps.\n",
        "  expected  lamp 2 red ",
        "  answer ✓  lamp 2 red ",
        "note  a note\n",
    ):
        assert expected in text
    assert text.rstrip().splitlines()[-1].lstrip("━╸╺ ").startswith("3/40 loss")
    assert file.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor must be shown again"


def test_a_wrong_answer_has_no_tick_and_a_missing_reference_no_line() -> None:
    file = io.StringIO()
    sink = Lines(Console(file=file, width=60), Pace(1))
    sink.samples([Sample("a", "b", "c"), Sample("Tell a story", "", "Once")], 1)
    assert "✓" not in file.getvalue()
    assert file.getvalue().count("expected") == 1


def test_text_of_a_model_cannot_send_commands_to_the_terminal() -> None:
    file = io.StringIO()
    sink = Lines(Console(file=file, width=200), Pace(1))
    evil = "a\x1b[31mred\x07\x9b2J\r\nnext [bold]x[/bold] [/] \u202e \ud800 end"
    sink.samples([Sample(evil, "", evil)], 1)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", file.getvalue())
    assert "next [bold]x[/bold] [/]" in file.getvalue()
    assert len(one_line("word " * 1000)) < 260


SHOW = """
import sys, time
from pathlib import Path
from qlora.tracking import Tracker
print(sys.stderr.isatty(), flush=True)
sys.stdin.readline()
with Tracker(Path(sys.argv[1]), config={}, sections={}, total_steps=8) as tracker:
    for number in range(1, 9):
        tracker.step({"step": number, "loss": 1.0, "lr": 2e-4, "tokens_per_second": 100.0})
        tracker.note("still here")
        time.sleep(0.05)
    tracker.finish({})
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path, terminal: bool) -> None:
    reader, writer = os.openpty() if terminal else os.pipe()
    command = [sys.executable, "-c", SHOW, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=writer, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == f"{terminal}\n"
        os.close(writer)
        os.close(reader)
        process.stdin.write("go\n")
        process.stdin.close()
        assert process.wait(30) == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))


# All together


class Failing(Sink):
    def step(self, record: Metrics) -> None:
        raise OSError("disk on fire\nand a second line")


def refuse(section: Any, run: Run) -> Sink:
    raise ValueError("no server")


def test_each_tracker_has_a_recipe_section_and_a_folder_in_runs() -> None:
    assert set(Tracking.model_fields) == set(BACKENDS)
    assert set(BACKENDS) <= set(CONTENTS) & set(NAME_PATTERNS)


@pytest.mark.parametrize(
    ("open_sink", "reason"), [(lambda *_: Failing(), "disk on fire"), (refuse, "no server")]
)
def test_a_failing_tracker_gives_one_note_and_the_run_continues(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    open_sink: Any,
    reason: str,
) -> None:
    monkeypatch.setitem(BACKENDS, "broken", Backend("broken", re.compile(""), open_sink))
    sections = {"broken": {"url": "http://localhost"}}
    with Tracker(tmp_path, config={}, sections=sections, total_steps=2, terminal=False) as tracker:
        for number in (1, 2):
            tracker.step(step(number))
        tracker.finish({})
    assert lines(tmp_path / "metrics.jsonl") == [step(1), step(2)]
    assert [record.getMessage() for record in caplog.records] == [
        f"tracking.broken is off for this run: {reason}"
    ]


def test_the_tracker_is_closed_properly_and_once_if_a_run_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Tracker(tmp_path, config={}, sections={}, total_steps=9, terminal=False) as tracker:
            tracker.step(step(1))
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        fail()
    assert lines(tmp_path / "metrics.jsonl") == [step(1)]
    with Tracker(tmp_path, config={}, sections={}, total_steps=9, resume_step=1, terminal=False) as tracker:
        tracker.step(step(2))
        tracker.finish({})
        tracker.finish({})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_without_a_terminal_notes_go_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Tracker(tmp_path, config={}, sections={}, total_steps=9, terminal=False) as tracker:
        tracker.note("the disk is full")
        tracker.samples([SAMPLE], 0)
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]


def test_other_processes_record_nothing_and_show_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, config={}, sections={}, total_steps=1, main=False) as tracker:
        tracker.step(step(1))
        tracker.note("quiet")
        tracker.finish({})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_progress_writes_nothing_to_standard_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, config={}, sections={}, total_steps=1) as tracker:
        tracker.step(step(1))
        tracker.finish({})
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 1/1  loss 2.5000" in err
