"""The display of a command's start: stages as they happen, and no bars or padding in a log file."""

import io
import logging

import pytest

from qlora.tracking import startup as startup_module
from qlora.tracking.startup import Startup, silent

Error = pytest.CaptureFixture[str]


def test_a_log_gets_one_line_for_each_stage_without_padding(capsys: Error) -> None:
    startup = Startup()
    with startup.stage("reading the data") as progress:
        assert capsys.readouterr().err == "reading the data\n"  # before the stage ends
        progress("tokenising: 1 of 2 rows")
    startup.table([("device", "CPU"), ("", "a remark"), ("learning rate", "0.1")])
    assert capsys.readouterr().err.splitlines() == [
        "device         CPU",
        "               a remark",
        "learning rate  0.1",
    ]
    assert list(startup.seconds) == ["reading the data"]


def test_a_long_stage_reports_its_progress_in_a_log(capsys: Error, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_module, "DETAIL_SECONDS", 0.0)
    with Startup().stage("loading the base") as progress:
        progress("tensor 1 of 2")
    assert capsys.readouterr().err == "loading the base\ntensor 1 of 2\n"


def test_verbose_adds_the_duration_of_each_stage(capsys: Error) -> None:
    with Startup(verbose=True).stage("reading the data"):
        pass
    assert capsys.readouterr().err == "reading the data\nreading the data: 0.0 s\n"


def test_a_terminal_gets_a_line_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    startup = Startup()
    with startup.stage("planning [memory]") as progress:
        progress("trying [4] rows")
    text = stream.getvalue()
    assert "trying [4] rows" in text
    assert text.endswith("\x1b[2K"), "the line must be removed at the end"
    startup.table([("device", "CPU")])
    assert "CPU" in stream.getvalue()
    with startup.stage("downloading x", own_bars=True):
        assert stream.getvalue().endswith("downloading x\n")


def test_a_silent_start_measures_and_logs_only_warnings(
    capsys: Error, caplog: pytest.LogCaptureFixture
) -> None:
    startup = silent()
    with startup.stage("reading the data") as progress:
        progress("tokenising")
    startup.table([("device", "CPU")])
    with caplog.at_level(logging.WARNING):
        startup.warn("nothing to resume")
    assert caplog.messages == ["nothing to resume"]
    assert capsys.readouterr().err == ""
    assert startup.seconds["reading the data"] < 1
