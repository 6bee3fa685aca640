"""Tracking: the record is complete whatever happens, and what is shown of it is right and harmless."""

import io
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qlora.errors import SaveError
from qlora.tracking import Sample, Tracker
from qlora.tracking.record import Record
from qlora.tracking.terminal import Bar, Lines, Pace, one_line
from qlora.tracking.wandb import choose_mode

DISABLED = SimpleNamespace(mode="disabled", project="qlora", entity=None, name=None, tags=[])
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


def test_every_line_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
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


def test_what_is_not_finite_is_recorded_as_it_is(tmp_path: Path) -> None:
    with recording(tmp_path / "metrics.jsonl") as record:
        record.step(step(1, loss=math.nan, grad_norm=math.inf))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert math.isnan(float(line["loss"]))
    assert float(line["grad_norm"]) == math.inf
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # no JSON


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with recording(path) as record:
        for number in range(1, 6):
            record.step(step(number))
            record.evaluation(evaluation(number, 1.0))
    with path.open("a") as file:
        file.write('{"step": 6, "loss": 1.')  # the kill came here
    with recording(path, resume_step=3) as resumed:
        assert [line["step"] for line in lines(path)] == [1, 1, 2, 2, 3, 3]
        resumed.step(step(4))
    assert [line["step"] for line in lines(path)][-2:] == [3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "broken", ['{"step": 2', '{"step": 2}', "[]\n", '{"note": 1}\n', '{"step": "2"}\n', "\0\0\0\n"]
)
def test_what_a_kill_or_a_power_cut_left_is_cut(tmp_path: Path, broken: str) -> None:
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
def test_lines_that_found_no_room_are_written_later_or_the_end_says_so(
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


def test_time_left_is_the_pace_after_the_first_step() -> None:
    clock = Clock()
    pace = Pace(total_steps=104, first_step=100, clock=clock)
    clock.now = 1000.0  # loading, evaluation: not the pace of the steps
    assert pace.time_left(101) == ""
    clock.now += 65.0
    assert pace.time_left(102) == "2:10 left"
    clock.now += 2 * 3600
    assert pace.time_left(103) == "1:00:32 left"


def test_a_log_gets_a_line_now_and_then_and_the_last_one() -> None:
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
    assert file.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_a_wrong_answer_is_not_ticked_and_no_reference_is_not_shown() -> None:
    file = io.StringIO()
    sink = Lines(Console(file=file, width=60), Pace(1))
    sink.samples([Sample("a", "b", "c"), Sample("Tell a story", "", "Once")], 1)
    assert "✓" not in file.getvalue()
    assert file.getvalue().count("expected") == 1


def test_text_of_a_model_cannot_command_the_terminal() -> None:
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
from types import SimpleNamespace
from qlora.tracking import Tracker
print(sys.stderr.isatty(), flush=True)
sys.stdin.readline()
section = SimpleNamespace(mode="disabled")
with Tracker(Path(sys.argv[1]), config={}, wandb=section, total_steps=8) as tracker:
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


def test_the_tracker_closes_once_and_well_when_a_run_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Tracker(tmp_path, config={}, wandb=DISABLED, total_steps=9, terminal=False) as tracker:
            tracker.step(step(1))
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        fail()
    assert lines(tmp_path / "metrics.jsonl") == [step(1)]
    with Tracker(
        tmp_path, config={}, wandb=DISABLED, total_steps=9, resume_step=1, terminal=False
    ) as tracker:
        tracker.step(step(2))
        tracker.finish({})
        tracker.finish({})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_without_a_terminal_notes_go_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Tracker(tmp_path, config={}, wandb=DISABLED, total_steps=9, terminal=False) as tracker:
        tracker.note("the disk is full")
        tracker.samples([SAMPLE], 0)
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]


def test_other_processes_record_and_show_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, config={}, wandb=DISABLED, total_steps=1, main=False) as tracker:
        tracker.step(step(1))
        tracker.note("quiet")
        tracker.finish({})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_progress_leaves_standard_output_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, config={}, wandb=DISABLED, total_steps=1) as tracker:
        tracker.step(step(1))
        tracker.finish({})
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 1/1  loss 2.5000" in err


# Weights & Biases: real runs in processes of their own, since the library keeps a helper process and state

RUN = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
if sys.argv[2] == "missing":
    sys.modules["wandb"] = None  # import wandb raises ImportError
from qlora.tracking import Sample, Tracker
section = SimpleNamespace(mode="auto", project="tests", entity=None, name=None, tags=["a-tag"])
config = {"optimizer": {"lr": 2e-4}, "training": {"seed": 7}}
slowest = 0.0
with Tracker(Path(sys.argv[1]), config=config, wandb=section, total_steps=20) as tracker:
    for number in range(1, 21):
        time.sleep(0.01)
        began = time.perf_counter()
        tracker.step({"step": number, "loss": 2.5 / number, "lr": 2e-4, "grad_norm": 0.7,
                      "tokens_per_second": 100.0, "tokens": 900, "supervised_tokens": 300})
        if number % 10 == 0:
            tracker.evaluation({"step": number, "eval_loss": 3.0 / number, "eval_tokens": 50})
            tracker.samples([Sample("a prompt", "expected", "an answer")], number)
        slowest = max(slowest, time.perf_counter() - began)
    began = time.perf_counter()
    tracker.finish({"loss_after": 0.15, "memory": {"resident_bytes": 123}})
print(slowest, time.perf_counter() - began)
"""


def train(run: Path, how: str = "installed", **environment: str) -> tuple[float, float, float, str]:
    """Seconds of the slowest step, of finish and of the whole process; standard error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(run), how],
        capture_output=True,
        text=True,
        check=True,
        env=clean | {"NETRC": "/dev/null", "no_proxy": "127.0.0.1"} | environment,
        timeout=120,
    )
    slowest, finish = map(float, done.stdout.split())
    assert [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line] == list(range(1, 21))
    return slowest, finish, time.perf_counter() - began, " ".join(done.stderr.split())


def stored(run: Path) -> list[Any]:
    """The records of the offline run in a folder, from its own file.

    The file is LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, in them chunks of (CRC 4
    bytes, length 2, type 1, data); types 1 whole record, 2 first, 3 middle, 4 last part of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record as Message

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(Message.FromString(parts))
            parts = b""
    return found


def test_an_offline_run_holds_what_the_record_holds(tmp_path: Path) -> None:
    _, _, _, stderr = train(tmp_path)
    assert "note" not in stderr
    history: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    tags: list[str] = []
    for message in stored(tmp_path):
        if message.HasField("history"):
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.history.item}
            history.setdefault(row["_step"], {}).update(row)
        if message.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
            tags = list(message.run.tags)
            assert message.run.display_name == tmp_path.name
        if message.HasField("summary"):
            summary |= {
                "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.summary.update
            }
    for line in (line for line in lines(tmp_path / "metrics.jsonl") if "samples" not in line):
        assert {key: history[line["step"]][key] for key in line if key != "step"} == {
            key: value for key, value in line.items() if key != "step"
        }
    assert {number for number, row in history.items() if "samples/path" in row or "samples" in row} == {
        10,
        20,
    }
    assert config["optimizer"] == {"lr": 2e-4}
    assert tags == ["a-tag"]
    assert summary["loss_after"] == 0.15
    table = next(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_20_*.json"))
    assert json.loads(table.read_text())["data"] == [[20, "a prompt", "expected", "an answer"]]


def test_a_resumed_folder_keeps_its_id(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path)
    ids = {path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb" / "id").read_text()}


def test_where_wandb_is_not_installed_a_run_goes_on(tmp_path: Path) -> None:
    slowest, finish, _, stderr = train(tmp_path, "missing")
    assert "note wandb is not installed" in stderr
    assert slowest < 0.5
    assert finish < 0.5
    assert not (tmp_path / "wandb").exists()


def test_an_unreachable_server_means_an_offline_run(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound, not listening: the port is closed and stays so
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        slowest, finish, _, stderr = train(
            tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{port}"
        )
    assert stderr.count("note") == 1
    assert f"127.0.0.1:{port} cannot be reached (Connection refused): the run is kept offline" in stderr
    assert slowest < 0.5
    assert finish < 6
    assert any(message.HasField("history") for message in stored(tmp_path))


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield server.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_never_answers_costs_a_bounded_time(tmp_path: Path, silent_server: int) -> None:
    slowest, finish, whole, stderr = train(
        tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{silent_server}"
    )
    assert "Weights & Biases is off for this run" in stderr
    assert slowest < 0.5, "no step waits for it"
    assert finish < 13
    assert whole < 20


@pytest.mark.parametrize(
    ("mode", "environment", "expected", "notes"),
    [
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled", 0),
        ("offline", {"WANDB_API_KEY": "k"}, "offline", 0),
        ("online", {"WANDB_API_KEY": "k"}, "online", 0),
        ("online", {}, "offline", 1),
        ("auto", {}, "offline", 0),
        ("auto", {"WANDB_API_KEY": "k"}, "online", 0),
        ("auto", {"NETRC": "host"}, "online", 0),
        ("auto", {"NETRC": "another.host"}, "offline", 0),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline", 0),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled", 0),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline", 0),
    ],
)
def test_the_mode_is_decided_before_wandb_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    silent_server: int,
    mode: str,
    environment: dict[str, str],
    expected: str,
    notes: int,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    host = f"127.0.0.1:{silent_server}"
    netrc = tmp_path / "netrc"
    netrc.write_text(
        f"machine {environment.get('NETRC', 'none').replace('host', host)} login user password k\n"
    )
    for name, value in (environment | {"NETRC": str(netrc)}).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    assert choose_mode(mode, f"http://{host}", said.append) == expected
    assert len(said) == notes
