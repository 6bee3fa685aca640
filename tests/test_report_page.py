"""report.html is complete, matches the run's files, is safe with any data, and loads nothing."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_for_tests import llama_7b, tiny, whole_model
from typer.testing import CliRunner

from qlora.cli import app
from qlora.errors import ModelError, RecipeError
from qlora.memory.parts import PARTS
from qlora.recipe import Recipe
from qlora.report import curves, history, memory_picture
from qlora.report.headlines import duration
from qlora.report.memory_comparison import RULE_OF_THUMB, Comparison
from qlora.report.page import render, write_page
from qlora.report.samples import EVALUATIONS, prompts
from qlora.tracking import Sample
from qlora.tracking.record import Record
from qlora.training.run_folder import RunFolder

EVIL = (
    "</pre></script><script>alert(1)</script><img src=//x.y onerror=alert(1)> '\" & \u202e \ud800 {{ 7*7 }}"
)
VOID = {"meta", "br", "img", "link"}


def run_in(
    folder: Path, steps: int = 40, *, finished: bool = True, memory: Any = None, text: str = "Hi"
) -> Path:
    """Write a run of `steps` steps as the tracker writes it, with an evaluation at every tenth step."""
    folder.mkdir(exist_ok=True)
    recipe = Recipe.load("quickstart", ["training.max_steps=40", f"output={folder}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "run.json").write_text('{"run_id": "a"}')
    record = Record(folder / "metrics.jsonl")
    for step in range(steps + 1):
        if step:
            numbers = {"loss": 7 / step, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1000.0 + step}
            record.step({"step": step, **numbers, "tokens": 350, "supervised_tokens": 140})
        if step % 10 == 0:
            loss = 4.0 - 0.05 * step
            record.evaluation({"step": step, "eval_loss": loss, "eval_tokens": 9, "peak_memory_bytes": 2**29})
            record.samples([Sample(text, "yes", "yes\n" if step > 20 else text)], step)
    record.finish({})
    if finished:
        peak = {"resident_bytes": 2**30, "allocated_bytes": None, "reserved_bytes": None}
        result = {"steps": steps, "total_steps": 40, "seconds": 100.0, "memory": peak, "loss_after": 2.0}
        (folder / "result.json").write_text(json.dumps(result))
    if memory is not None:
        (folder / "memory.json").write_text(json.dumps(memory))
    return folder


class Page(HTMLParser):
    """Parses a page into its elements and texts; a closing tag that fits no opening tag is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> with nothing open"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(run: Path) -> Page:
    return Page(write_page(run).read_text(encoding="utf-8"))


CASES = {
    "finished": {},
    "measured": {"memory": llama_7b()},
    "full": {"memory": whole_model()},
    "forecast": {"memory": tiny()},
    "unfinished": {"finished": False, "steps": 23},
    "first evaluation": {"finished": False, "steps": 0},
    "evil": {"text": EVIL, "memory": {**llama_7b(capacity_bytes=2**33), "device": {
        "kind": "cuda", "name": "</text></svg><script>alert(1)</script>", "capacity_bytes": 2**33}}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path, case: str) -> None:
    run = run_in(tmp_path / f"{case} <b onclick=x> & \"'", **CASES[case])
    page = page_of(run)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"img", "link", "iframe", "object", "embed", "base", "form", "a"} & {
        tag for tag, _ in page.elements
    }
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "//" not in value or name == "data-chart", (tag, name, value)
            assert name not in {"src", "srcset", "action", "xmlns"}, (tag, name)
            assert name != "href" or value.startswith("#")
            assert all(target == "#" for target in re.findall(r"url\(['\"]?(.)", value))
    (style,) = page.texts["style"]
    assert "url(" not in style
    assert "@import" not in style
    assert (run / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize("case", ["measured", "evil"])
def test_only_the_pages_own_script_can_run(tmp_path: Path, case: str) -> None:
    run = run_in(tmp_path, **CASES[case])
    html = write_page(run).read_text(encoding="utf-8")
    page = Page(html)
    assert page.all("script") == [{}]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


def test_data_is_shown_unchanged(tmp_path: Path) -> None:
    page = page_of(run_in(tmp_path, text=EVIL))
    assert EVIL.replace("\ud800", "?") in "".join(page.texts["dd"])
    assert page.texts["pre"] == [(tmp_path / "recipe.yaml").read_text().strip()]


def headlines(page: Page) -> dict[str, list[str]]:
    """Return label -> (value, note), from the page's first list."""
    words = page.texts["dd"]
    return {
        label: words[2 * i : 2 * i + 2] for i, label in enumerate(page.texts["dt"][: words.index("Hi") // 2])
    }


def test_the_headlines_of_a_finished_run(tmp_path: Path) -> None:
    assert headlines(page_of(run_in(tmp_path))) == {
        "Held-out loss": ["4.000 → 2.000", "perplexity 54.6 before, 7.389 after"],
        "Steps": ["40 of 40", "8 rows each"],
        "Time": ["1 min 40 s", "14 s of it in steps"],
        "Tokens a second": ["1,020", "14,000 in total, 40% of them trained"],
        "Peak memory": ["1.00 GiB", "resident on the host"],
    }
    assert "finished" in page_of(tmp_path).texts["span"]


def test_the_headlines_of_an_unfinished_run(tmp_path: Path) -> None:
    page = page_of(run_in(tmp_path, 23, finished=False))
    assert headlines(page)["Steps"] == ["23 of 40", "8 rows each"]
    assert headlines(page)["Time"] == ["8.0 s", "in steps, without loading and evaluations"]
    assert headlines(page)["Peak memory"] == ["512 MiB", "up to step 20"]
    assert "not finished" in page.texts["span"]


def test_a_resumed_runs_time_covers_all_sessions(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "seconds": 3.0}))
    assert headlines(page_of(run))["Time"] == ["14 s", "in steps, without loading and evaluations"]


def test_memory_is_shown_with_its_table_and_pictures(tmp_path: Path) -> None:
    page = page_of(run_in(tmp_path, memory=llama_7b()))
    assert headlines(page)["Peak memory"] == ["7.87 GiB", "in backward; forecast 7.81 (-0.8%)"]
    assert len(page.all("svg")) == 4 + 2, "four charts, and two memory pictures: bars and timeline"
    cells = page.texts["td"]
    assert cells[-6:] == ["total", "50.21", "13.74", "7.81", "7.87", "-0.8%"]
    remarks = [text for text in page.texts["li"] if "too high" in text]
    assert page.texts["small"] == [RULE_OF_THUMB]
    assert page.texts["th"][1:3] == ["rule of thumb: full", "rule of thumb: LoRA"]
    assert remarks == ["The rule of thumb for LoRA gives 13.7 GiB, the measured peak 7.87 GiB: 75% too high."]
    page = page_of(run_in(tmp_path, memory=tiny()))
    assert headlines(page)["Peak memory, forecast"] == ["155 MiB", "in loss"]
    assert page.texts["td"][-4:] == ["total", "28.23", "9.65", "154.73"]


def rules(style: str, selector: str) -> str:
    """The declarations of every rule of exactly this selector."""
    return " ".join(re.findall(rf"(?m)^ *{re.escape(selector)} {{([^}}]*)}}", style))


def test_a_narrow_window_shows_tables_and_pictures_whole(tmp_path: Path) -> None:
    page = page_of(run_in(tmp_path, memory=llama_7b()))
    (style,) = page.texts["style"]
    assert "width: 100%" in rules(style, ".pictures svg")
    assert "min-width" not in rules(style, ".pictures svg"), "a picture shrinks with the window"
    assert "overflow-x: auto" in rules(style, ".scroll"), "a table with long numbers scrolls in its own box"
    narrow = style[style.index("@media (max-width: 40rem)") : style.rindex("@media print")]
    assert "font-size" in rules(narrow, "table")
    assert "white-space: normal" in rules(narrow, "td:first-child")
    for width, _ in (curves.INCHES, memory_picture.SVG_INCHES):
        assert width < 5, "text of 8 points has about 8 pixels in a window of 400"
    tags = [(tag, attributes.get("class")) for tag, attributes in page.elements]
    assert tags[tags.index(("table", None)) - 1] == ("div", "scroll")


def test_the_legend_names_every_part_of_the_pictures(tmp_path: Path) -> None:
    memory = llama_7b()
    page = page_of(run_in(tmp_path, memory=memory))
    swatches = [mark["style"].removeprefix("background: ") for mark in page.all("i") if "style" in mark]
    labels = [row.label for row in Comparison(memory).rows]
    shown = page.texts["li"][: len(swatches)]
    assert set(labels) < set(shown), "a part that is not alive at the peak is in the course of the step"
    assert [memory_picture.COLOURS[part] for part in PARTS if PARTS[part] in shown] == swatches
    drawn = memory_picture.bars_svg(memory) + memory_picture.timeline_svg(memory)
    assert all(colour in drawn for colour in swatches)


def test_every_point_is_in_the_page_for_the_script(tmp_path: Path) -> None:
    page = page_of(run_in(tmp_path))
    loss, rate, norm, speed = [json.loads(f["data-chart"]) for f in page.all("figure") if "data-chart" in f]
    assert loss["last"] == 40
    assert [series["name"] for series in loss["series"]] == ["training loss", "held-out loss"]
    assert loss["series"][0]["points"] == [[step, 7 / step] for step in range(1, 41)]
    assert loss["series"][1]["points"] == [[0, 4.0], [10, 3.5], [20, 3.0], [30, 2.5], [40, 2.0]]
    assert [chart["style"] for chart in (rate, norm, speed)] == ["power", "number", "count"]


# Reading


def test_a_run_that_was_killed_shows_its_whole_lines(tmp_path: Path) -> None:
    run = run_in(tmp_path, 20, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.')
    assert history.read(run / "metrics.jsonl").last_step == 20
    (run / "metrics.jsonl").unlink()
    assert "No step has been taken yet." in page_of(run).texts["p"]


def test_a_non_finite_loss_interrupts_the_curve(tmp_path: Path) -> None:
    run = run_in(tmp_path, 10, finished=False)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"loss": 1.4,', '"loss": "nan",'))
    (loss, *_) = curves.charts(history.read(run / "metrics.jsonl"))
    assert math.isnan(loss.series[0].points[4][1])
    assert loss.data["series"][0]["points"][4] == [5, None]
    line = max(paths(loss.svg, "--accent"), key=len)  # not the line in the legend
    assert (line.count("M"), line.count("L")) == (2, 7)
    assert "nan" not in loss.svg + loss.description


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=f"{folder}: no run here"):
            write_page(folder)
    run = run_in(tmp_path / "run")
    (run / "result.json").write_text("{")
    with pytest.raises(ModelError, match=r"result\.json: cannot be read"):
        write_page(run)
    (run / "recipe.yaml").write_text("base: {model: a}\nadapter: {rnk: 3}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2:11: adapter\.rnk"):
        write_page(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["result.json", "facts.json", "memory.json"])
@pytest.mark.parametrize("content", ["[]", "1", "[" * 100_000, '{"sha256": "a"}', '{"facts": [1]}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    run = run_in(tmp_path / "run", finished=False)
    (run / name).write_text(content)
    with pytest.raises(ModelError, match=rf"{name}: .*(R|r)emove the file or restore it"):
        write_page(run)


def test_no_flipped_character_of_the_result_reaches_the_page(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    RunFolder(run, "a").write_result(json.loads((run / "result.json").read_text()))
    file = run / "result.json"
    assert headlines(page_of(run))["Steps"] == ["40 of 40", "8 rows each"]
    whole = file.read_bytes()
    for digit in re.finditer(rb"(?<=: )[0-9]", whole):
        place = digit.start()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ModelError, match=r"result\.json: cannot be read"):
            write_page(run)


def test_the_command_writes_the_page_and_prints_its_path(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(run)])
    assert (result.exit_code, result.stdout) == (0, f"{run / 'report.html'}\n")
    assert (run / "report.html").read_text() == render(run)


def test_the_command_exits_with_4_without_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlora", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = f"qlora: {tmp_path}: no run here. Pass the folder of a run, for example runs/quickstart\n"
    assert (done.returncode, done.stdout, done.stderr) == (4, "", message)


# Curves


def test_a_long_run_keeps_its_extremes_and_gets_a_mean() -> None:
    points = [(step, math.sin(step)) for step in range(1, 50_001)]
    points[30_000] = (30_001, 99.0)
    points[40_000] = (40_001, math.nan)
    kept = curves.thinned(points)
    assert len(kept) <= curves.POINTS
    assert {(30_001, 99.0), points[-1]} <= set(kept)
    assert any(math.isnan(value) for _, value in kept)
    assert kept == sorted(kept)
    means = curves.trailing_means([(i + 10, float(i)) for i in range(10)], [(10, 0.0), (14, 4.0)], window=3)
    assert means == [(10, 0.0), (14, 3.0)]


def paths(svg: str, variable: str) -> list[str]:
    """Return the lines that have a given colour variable of the page."""
    elements = ElementTree.fromstring(svg).iter("path")
    return [path.get("d", "") for path in elements if f"stroke: var({variable}" in path.get("style", "")]


def chart_of(*values: float, style: str = "number") -> curves.Chart:
    """Return a chart of one curve that begins at step 1."""
    return curves.Chart("Loss", "", [curves.Series("loss", list(enumerate(values, 1)))], len(values), style)


def heights(chart: curves.Chart) -> list[str]:
    """Return the numbers of the vertical axis, from the bottom up."""
    texts = ElementTree.fromstring(chart.svg).iter("text")
    return [text.text or "" for text in texts if "text-anchor: end" in text.get("style", "")]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=3))
@example([6925363.0, 6925363.0 + 1e-9])
@example([0.0, 0.0])
@example([math.nan, math.inf])
def test_any_curve_can_be_drawn_and_lies_inside_its_plot(values: list[float]) -> None:
    chart = chart_of(*values)
    inches, points = curves.INCHES[1], 72
    top, bottom = (points * inches * (1 - edge) for edge in (curves.TOP, curves.BOTTOM))
    for path in paths(chart.svg, "--accent"):
        for height in re.findall(r"[ML] \S+ (\S+)", path):
            assert top - 0.1 <= float(height) <= bottom + 0.1
    assert 2 <= len(heights(chart)) <= 7


def test_the_scale_is_round_and_begins_at_zero_unless_values_are_far_away() -> None:
    assert heights(chart_of(1.2, 7.3)) == ["0", "2", "4", "6", "8"]
    assert heights(chart_of(3, 3)) == ["0", "2", "4", "6"]
    assert heights(chart_of(0.00002, 0.00019)) == ["0.00000", "0.00005", "0.00010", "0.00015", "0.00020"]
    assert heights(chart_of(2150, 2800, style="count")) == [
        "2,000",
        "2,200",
        "2,400",
        "2,600",
        "2,800",
        "3,000",
    ]


@pytest.mark.parametrize("value", [2e-4, 1.0, 3.7, 0.0])
def test_a_constant_line_is_in_the_middle_of_its_chart(value: float) -> None:
    (line,) = paths(chart_of(value, value).svg, "--accent")
    top, bottom = (72 * curves.INCHES[1] * (1 - edge) for edge in (curves.TOP, curves.BOTTOM))
    for height in re.findall(r"[ML] \S+ (\S+)", line):
        assert 0.3 < (float(height) - top) / (bottom - top) < 0.7


@pytest.mark.parametrize("values", [(0.0, 2e-3, 2e-3), (2000.0, 2800.0, 2800.0, 2000.0, 2000.0)])
def test_a_line_that_becomes_constant_is_off_the_edges(values: tuple[float, ...]) -> None:
    (line,) = paths(chart_of(*values).svg, "--accent")
    top, bottom = (72 * curves.INCHES[1] * (1 - edge) for edge in (curves.TOP, curves.BOTTOM))
    drawn = [(float(height) - top) / (bottom - top) for height in re.findall(r"[ML] \S+ (\S+)", line)]
    assert min(drawn) > 0.04
    assert max(drawn) < 0.96 or min(values) == 0


def test_the_script_marks_points_on_the_curve(tmp_path: Path) -> None:
    page = page_of(run_in(tmp_path))
    plots = [div["style"] for div in page.all("div") if div.get("class") == "plot"]
    assert len(set(plots)) == 1
    top, right, bottom, left = (float(edge) / 100 for edge in re.findall(r"([\d.]+)%", plots[0]))
    (loss, *_) = curves.charts(history.read(tmp_path / "metrics.jsonl"))
    width, height = (72 * inches for inches in curves.INCHES)
    dots = [use for use in ElementTree.fromstring(loss.svg).iter("use") if "--second" in use.get("style", "")]
    steps = [width * (left + (1 - left - right) * step / 40) for step in (0, 10, 20, 30, 40)]
    assert [float(dot.get("x", "")) for dot in dots[:5]] == pytest.approx(steps, abs=0.1)
    scale = height * (1 - top - bottom) / 8  # 0 to 8 nats
    assert float(dots[0].get("y", "")) == pytest.approx(height * top + 4 * scale, abs=0.1)


def test_a_chart_uses_the_pages_colours_and_has_a_description(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for chart in curves.charts(history.read(run / "metrics.jsonl")):
        assert not re.findall(r"(?<!, )#[0-9a-f]{6}", chart.svg), "a colour that the page does not define"
    labels = [div["aria-label"] for div in page_of(run).all("div") if div.get("role") == "img"]
    assert labels[0] == "Loss by step: training loss from 7 to 0.175, held-out loss from 4 to 2"
    assert len(labels) == 4


def test_the_same_run_has_the_same_page(tmp_path: Path) -> None:
    run = run_in(tmp_path, memory=tiny())
    assert render(run) == render(run)


def test_the_charts_of_a_long_run_are_small() -> None:
    steps = [
        {
            "step": i,
            "loss": math.sin(i),
            "lr": 1 / i,
            "grad_norm": math.cos(i),
            "tokens_per_second": 900 + i % 7,
        }
        for i in range(1, 10_001)
    ]
    evaluations = [{"step": i, "eval_loss": math.sin(i)} for i in range(0, 10_001, 10)]
    for chart in curves.charts(history.History(steps, evaluations, [])):
        assert len(chart.svg) + len(json.dumps(chart.data)) < 130_000


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (8.04, 54.4, 725, 12_000)] == ["8.0 s", "54 s", "12 min 5 s", "3 h 20 min"]


# Samples


def sampled(answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"step": 10 * i, "samples": [{"prompt": "p", "reference": "yes", "answer": answer}]}
        for i, answer in enumerate(answers)
    ]


def test_a_repeated_answer_is_shown_once() -> None:
    (prompt,) = prompts(sampled(["no", "no", "maybe", "yes\n", "yes\n"]))
    assert [(a.first, a.last, a.text, a.is_expected) for a in prompt.answers] == [
        (0, 10, "no", False), (20, 20, "maybe", False), (30, 40, "yes\n", True)
    ]  # fmt: skip


def test_many_evaluations_are_reduced_to_a_few_with_the_first_and_last() -> None:
    (prompt,) = prompts(sampled([str(i) for i in range(100)]))
    assert len(prompt.answers) == EVALUATIONS
    assert [prompt.answers[0].text, prompt.answers[-1].text] == ["0", "99"]
    assert prompts([]) == []


def test_long_text_is_cut() -> None:
    (prompt,) = prompts(sampled(["x" * 10**6]))
    assert len(prompt.answers[0].text) < 5000
