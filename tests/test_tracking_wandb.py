"""Weights & Biases: the same numbers as the record, and no harm if it is not available.

The runs are real runs in separate processes, because the library keeps global state and a helper process.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora.recipe import Recipe
from qlora.tracking.wandb import choose_mode, reason_of, run_id


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_setting_that_wandb_s_schema_refuses_is_named() -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        Recipe.model_validate({"base": 1})
    assert reason_of(caught.value).startswith("base: Input should be")
    assert reason_of(OSError("no network.\nmore")) == "no network"


RUN = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
if sys.argv[2] == "missing":
    sys.modules["wandb"] = None  # import wandb raises ImportError
from qlora.tracking import Sample, Tracker
section = SimpleNamespace(mode="auto", project="tests", entity=None, name=None, tags=["a-tag"])
config = {"optimizer": {"lr": 2e-4}, "training": {"seed": 7}}
slowest, steps = 0.0, time.perf_counter()
with Tracker(Path(sys.argv[1]), config=config, sections={"wandb": section}, total_steps=20) as tracker:
    for number in range(1, 21):
        time.sleep(0.01)
        began = time.perf_counter()
        tracker.step({"step": number, "loss": 2.5 / number, "lr": 2e-4, "grad_norm": 0.7,
                      "tokens_per_second": 100.0, "tokens": 900, "supervised_tokens": 300})
        if number % 10 == 0:
            tracker.evaluation({"step": number, "eval_loss": 3.0 / number, "eval_tokens": 50})
            tracker.samples([Sample("a prompt", "expected", "an answer")], number)
        slowest = max(slowest, time.perf_counter() - began)
    steps = time.perf_counter() - steps
    tracker.finish({"loss_after": 0.15, "memory": {"resident_bytes": 123}})
print(slowest, steps)
"""


def train(run: Path, how: str = "installed", **environment: str) -> tuple[float, float, str]:
    """Run a training loop. Return the seconds of the slowest step, the seconds outside steps, and standard error."""
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
    slowest, steps = map(float, done.stdout.split())
    assert [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line] == list(range(1, 21))
    return slowest, time.perf_counter() - began - steps, " ".join(done.stderr.split())


def stored(run: Path) -> list[Any]:
    """Return the records of the offline run in a folder, read from its own file.

    The file has LevelDB's log format after a header of 7 bytes: blocks of 32 KiB with chunks of (CRC 4 bytes, length 2,
    type 1, data). Types: 1 whole record, 2 first, 3 middle, 4 last part of a record.
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


def logged_steps(run: Path) -> set[int]:
    """Return the steps of the offline run in a folder."""
    rows = (values(message.history.item) for message in stored(run) if message.HasField("history"))
    return {row["_step"] for row in rows}


def values(items: Any) -> dict[str, Any]:
    """Convert the format's items to name -> value."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_an_offline_run_has_the_numbers_of_the_record(tmp_path: Path) -> None:
    own_id = run_id(tmp_path)
    _, _, stderr = train(tmp_path)
    assert "note" not in stderr
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(f"-{own_id}")
    assert run_id(tmp_path) == own_id, "a resumed run continues the same W&B run"
    history: dict[int, dict[str, Any]] = {}
    config, summary, tags = {}, {}, set()
    for message in stored(tmp_path):
        if message.HasField("history"):
            row = values(message.history.item)
            history.setdefault(row["_step"], {}).update(row)
        config |= values(message.run.config.update)
        summary |= values(message.summary.update)
        tags |= set(message.run.tags)
    for line in lines(tmp_path / "metrics.jsonl"):
        expected = {key: value for key, value in line.items() if key not in ("step", "samples")}
        assert {key: history[line["step"]][key] for key in expected} == expected
    assert len(history) == 20
    assert config["optimizer"] == {"lr": 2e-4}
    assert summary["loss_after"] == 0.15
    assert tags == {"a-tag"}
    table = next(folder.glob("files/media/table/samples_20_*.json"))
    assert json.loads(table.read_text())["data"] == [[20, "", "a prompt", "expected", "an answer"]]


def test_a_run_continues_if_wandb_is_not_installed(tmp_path: Path) -> None:
    slowest, rest, stderr = train(tmp_path, "missing")
    assert "note wandb is not installed" in stderr
    assert slowest < 2
    assert rest < 8  # Python and its imports
    assert not (tmp_path / "wandb").exists()


def test_an_unreachable_server_gives_an_offline_run(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound, but not listening: the port stays closed
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        slowest, rest, stderr = train(
            tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{port}"
        )
    assert stderr.count("note") == 1
    assert f"127.0.0.1:{port} cannot be reached (Connection refused), so the run is kept offline" in stderr
    assert slowest < 2
    assert rest < 25  # wandb takes 2 s to start on an idle machine
    assert any(message.HasField("history") for message in stored(tmp_path))


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Listen on a port and accept connections, but never answer."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield server.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_never_answers_costs_a_bounded_time(tmp_path: Path, silent_server: int) -> None:
    slowest, rest, stderr = train(
        tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{silent_server}"
    )
    assert stderr.count("note") == 1
    assert "so the run is kept offline" in stderr
    assert slowest < 2, "no step must wait for the server"
    assert rest < 45  # 13 s on an idle machine, of which wandb.init may use 10 s
    assert logged_steps(tmp_path) == set(range(1, 21))


@pytest.mark.parametrize("status", [401, pytest.param(500, marks=pytest.mark.slow)])
def test_a_server_that_refuses_the_start_gives_an_offline_run(tmp_path: Path, status: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(status)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        slowest, rest, stderr = train(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=url)
        server.shutdown()
    assert stderr.count("note") == 1
    assert f"{status}" in stderr
    assert "so the run is kept offline" in stderr
    assert slowest < 2
    assert rest < 45
    assert logged_steps(tmp_path) == set(range(1, 21))


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
