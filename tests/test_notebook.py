"""A run in a notebook has one output that is updated, and its outcome shows itself."""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from examples_for_tests import ROOT, blocks

from qlora.recipe import Recipe
from qlora.report.live import LossPicture
from qlora.tracking import Sample
from qlora.tracking.notebook import UPDATE_SECONDS, Live, NotebookStartup, in_notebook
from qlora.training import train as loop
from qlora.training.train import train

RecipeFile = Callable[..., Path]
PAGE = ROOT / "docs/tutorials/from-a-notebook.md"


class Shown:
    """The outputs of a front end, each with all its states."""

    def __init__(self) -> None:
        self.outputs: list[list[Mapping[str, str]]] = []

    def display(self, content: Mapping[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        states = [content]
        self.outputs.append(states)
        return SimpleNamespace(update=lambda content, raw: states.append(content))

    @property
    def html(self) -> list[str]:
        """The states of the only output."""
        (states,) = self.outputs
        return [state["text/html"] for state in states]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Stand in for IPython in a kernel."""
    shown, package, module = Shown(), ModuleType("IPython"), ModuleType("IPython.display")
    package.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    package.version_info = (9, 0, 0)  # type: ignore[attr-defined] # matplotlib asks
    module.display = shown.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def record(step: int, loss: float = 2.5) -> dict[str, Any]:
    numbers = {"loss": loss, "lr": 2e-4, "grad_norm": 0.7, "tokens_per_second": 1234.5}
    return {"step": step, **numbers, "tokens": 900, "supervised_tokens": 300}


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)]
)
def test_a_kernel_is_a_notebook_and_a_shell_is_not(
    monkeypatch: pytest.MonkeyPatch, shell: Any, expected: bool
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    assert in_notebook() is expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


@pytest.mark.usefixtures("without_forecast")
def test_a_run_has_one_output_and_prints_nothing(
    recipe_file: RecipeFile, shown: Shown, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.tracking.notebook.UPDATE_SECONDS", 0.0)
    file = recipe_file(training={"max_steps": 3, "eval_every": 2, "samples": 1, "sample_tokens": 3})

    def interrupt(step: Mapping[str, Any]) -> None:
        if step["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)  # as a kernel interrupts a cell

    stopped = train(Recipe.load(file), metrics=lambda held_out: {"half": 0.5}, on_step=interrupt)
    assert stopped.stopped_by == signal.SIGINT
    first, last = shown.html[0], shown.html[-1]
    assert "reading the data" in first
    assert "stopped after step 2; continue with resume=True" in last
    assert "step 2 of 3" in last
    assert "held-out loss, step 0" in last
    assert "half</th>" in last
    assert "sample answers" in last
    assert "LoRA of rank 4" in last
    assert "<svg" in last
    assert len(shown.html) < 40, "one update for each event at most"
    html = stopped._repr_html_()
    assert "at the latest evaluation" in html
    assert "2 of 3; stopped by SIGINT, continue with resume=True" in html
    assert f'href="{os.path.relpath(stopped.run / "report.html")}"' in html
    shown.outputs.clear()
    done = train(Recipe.load(file), resume=True, metrics=lambda held_out: {"half": 0.5})
    assert f"finished: {done.result}" in shown.html[-1]
    assert "step 3 of 3" in shown.html[-1]
    assert re.search(r"held-out loss, step 3</th>.* at step 0\)", shown.html[-1])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert repr(done).startswith(
        f"TrainResult(run='{done.run}', result='{done.result}', steps=3, total_steps=3"
    )
    assert "facts" not in repr(done)
    assert re.match(r"held-out loss  \d\.\d+ before, \d\.\d+ after\n", str(done))
    assert [line.split()[0] for line in str(done).splitlines()] == [
        "held-out", "half", "steps", "time", "memory", "files"
    ]  # fmt: skip
    assert loop.TrainResult.from_json(done.as_json(), Path("x")) == done


def test_an_output_is_updated_at_most_once_a_second_and_less_if_drawing_is_slow(shown: Shown) -> None:
    now, drawing = [0.0], 0.01

    def draw() -> str:
        now[0] += drawing
        return ""

    live = Live(lambda: now[0])
    live.draw = draw
    for _ in range(1000):
        live.update()
        now[0] += 0.01
    assert len(shown.html) == pytest.approx(10 / UPDATE_SECONDS, abs=1)
    drawing = 1.0
    before, began = len(shown.html), now[0]
    for _ in range(1000):
        live.update()
        now[0] += 0.1
    updates = len(shown.html) - before
    assert updates / (now[0] - began) < 0.06
    live.update(now=True)
    assert len(shown.html) == before + updates + 1


def test_texts_cannot_become_markup(shown: Shown, tmp_path: Path) -> None:
    start = NotebookStartup(LossPicture)
    evil = "<script>alert(1)</script>"
    start.table([("data", evil)])
    start.warn(evil)
    with start.stage(evil):
        sink = start.display(tmp_path, 3, 0, None)
    sink.step(record(1))
    sink.evaluation({"step": 1, "eval_loss": 2.0, "eval_tokens": 9, f"eval_{evil}": 1.0})
    sink.samples([Sample(evil, evil, evil, evil)], 1)
    sink.note(evil)
    sink.finish({}, failed=True)
    assert "script&gt;" in shown.html[-1]
    assert "ended by an error" in shown.html[-1]
    assert "<script" not in "".join(shown.html)


def test_an_output_that_cannot_be_updated_does_not_end_the_run(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def broken(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError("the kernel's socket is closed")

    monkeypatch.setattr(sys.modules["IPython.display"], "display", broken)
    live = Live()
    live.update(now=True)
    live.update(now=True)
    assert len(calls) == 1
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    assert "the output of this cell is not updated any more: the kernel's socket" in caplog.text


def test_a_run_outside_the_main_thread_needs_no_signals(recipe_file: RecipeFile) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from qlora.runtime.signals import StopRequest

    def enter() -> bool:
        with StopRequest() as stop:
            return stop.requested

    handler = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial_runs_in_a_real_kernel(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    cells = [block.text for block in blocks(PAGE) if block.language == "python" and not block.title]
    for block in blocks(PAGE):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(text) for text in cells]
    messages: list[str] = []

    class Client(NotebookClient):
        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            messages.append(message["msg_type"])
            return super().process_message(message, cell, index)

    client = Client(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    training = [cell for cell in book.cells if "qlora.train(" in cell.source]
    assert len(training) >= 3
    for cell in training:
        kinds = [output["output_type"] for output in cell.outputs]
        assert kinds.count("display_data") == 1, kinds
        (live,) = [output for output in cell.outputs if output["output_type"] == "display_data"]
        assert "<svg" in live["data"]["text/html"]
        printed = "".join(
            o["text"] for o in cell.outputs if o["output_type"] == "stream" and o["name"] == "stderr"
        )
        # tqdm asks for ipywidgets once, where they are missing
        assert not re.sub(r".*TqdmWarning.*\n.*\n?", "", printed).strip(), printed
    assert messages.count("update_display_data") > len(training)
    assert messages.count("stream") < 20
    first = training[0].outputs[-1]["data"]
    assert "held-out loss" in first["text/html"]
    assert "report.html" in first["text/html"]
