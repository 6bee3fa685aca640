"""Memory reports: every number comes from memory.json, and pictures can be drawn of any run."""

import io
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from memory_for_tests import llama_7b, run_of, tiny, whole_model
from rich.console import Console

from qlora.errors import SaveError
from qlora.memory.parts import PARTS
from qlora.recipe.sizes import unit_for
from qlora.report import memory_files, memory_picture, pictures
from qlora.report.memory_comparison import RULE_OF_THUMB, RULE_OF_THUMB_IN_SHORT, Comparison
from qlora.storage import atomic

Memory = dict[str, Any]
EVERY = pytest.mark.parametrize("make", [llama_7b, tiny, whole_model, lambda: llama_7b(None)])


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the cells of every table, headers included."""
    blocks = [block for block in markdown.split("\n\n") if block.startswith("| ")]
    return [
        [
            [cell.strip(" *") for cell in line.strip("|").split(" | ")]
            for line in block.splitlines()
            if "---" not in line
        ]
        for block in blocks
    ]


def size(cell: str) -> float:
    return 0.0 if cell in ("–", "<0.01", "") else float(cell.replace(",", ""))


@EVERY
def test_the_numbers_of_memory_md_come_from_memory_json(make: Callable[[], Memory]) -> None:
    memory = make()
    columns = [
        memory["documents"]["full"],
        memory["documents"]["lora"],
        memory["forecast"],
        memory["measured"],
    ]
    unit = unit_for((memory["measured"] or memory["forecast"])["total_bytes"])
    (header, *rows, total), phases, *_ = tables(memory_files.markdown(memory))
    assert header == [
        unit.name,
        "rule of thumb: full",
        "rule of thumb: LoRA",
        *("forecast", "measured", "error"),
    ]
    assert {row[0] for row in rows} == {
        label
        for part, label in PARTS.items()
        if any(column and column["parts"].get(part) for column in columns)
    }
    keys = {label: part for part, label in PARTS.items()}
    for label, *cells, error in [*rows, total]:
        for cell, column in zip(cells, columns, strict=True):
            if column is None:
                assert cell == ("not measured" if label == "total" else "")
                continue
            expected = column["total_bytes"] if label == "total" else column["parts"].get(keys[label], 0)
            assert size(cell) == pytest.approx(expected / unit.unit_bytes, abs=0.00501)
        if memory["measured"] is None or label not in keys:
            continue
        forecast, measured = (memory[name]["parts"].get(keys[label], 0) for name in ("forecast", "measured"))
        assert error == (f"{100 * (forecast / measured - 1):+.1f}%" if measured else "")
    for name, forecast_cell, *_ in phases[1:]:
        expected = memory["forecast"]["phases"][name]
        assert size(forecast_cell) == pytest.approx(expected / unit.unit_bytes, abs=0.00501)


def test_memory_md_states_the_result_and_judges_the_rules_of_thumb() -> None:
    memory = llama_7b()
    text = memory_files.markdown(memory)
    assert "Peak 7.87 GiB in backward (forecast 7.81, -0.8%): 39% base, NF4; 23% optimizer state." in text
    assert "NVIDIA H100 80GB HBM3, 79.0 GiB: 71.1 GiB left. Micro-batches of 4 × 512 tokens, packed" in text
    for remark in memory["documents"]["remarks"]:
        assert f"- {remark}\n" in text
    short = llama_7b(None)
    short["device"]["capacity_bytes"] = short["forecast"]["total_bytes"] - 3 * 2**30
    assert "3.00 GiB too little" in memory_files.markdown(short)


def test_parts_that_were_not_measured_are_not_compared() -> None:
    memory = tiny()
    text = memory_files.markdown(memory)
    assert "Peak 154.73 MiB in loss (forecast): 74% saved activations; 20% logits and loss." in text
    assert "%" not in "".join(cell for table in tables(text) for row in table for cell in row)
    assert "measured" not in shown(memory, 100)


def test_numbers_of_the_driver_and_the_system_are_shown_with_the_parts() -> None:
    memory = llama_7b()
    assert tables(memory_files.markdown(memory))[2] == [
        ["GiB", "forecast", "measured", "error"],
        ["allocated by tensors", "7.33", "7.39", "-0.8%"],
        ["resident on the host", "", "2.79", ""],
    ]
    memory["forecast"]["reserved_bytes"], memory["measured"]["driver_bytes"] = 2**33, 2**34
    labels = [row[0] for row in tables(memory_files.markdown(memory))[2]]
    assert labels[1:] == [
        "allocated by tensors", "reserved by the allocator", "used by the process (driver)", "resident on the host"
    ]  # fmt: skip


def shown(memory: Memory, width: int, *, terminal: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=terminal).print(memory_files.table(memory))
    return file.getvalue()


@EVERY
@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_terminal_and_a_pipe(make: Callable[[], Memory], width: int) -> None:
    memory = make()
    text = shown(memory, width)
    assert "…" not in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    comparison = Comparison(memory)
    for row in [*comparison.rows, comparison.total]:
        cells = [cell for cell in [*row.cells(comparison.unit), row.error] if cell]
        assert any(
            line.split()[-len(cells) :] == cells and line.startswith(row.label) for line in text.splitlines()
        )


def test_on_a_narrow_terminal_labels_wrap_and_numbers_stay() -> None:
    text = shown(llama_7b(), 50)
    assert "…" not in text
    assert any(
        line.split() == ["total", "50.21", "13.74", "7.81", "7.87", "-0.8%"] for line in text.splitlines()
    )
    assert "rule of rule of" in " ".join(text.split())


@EVERY
def test_every_report_explains_the_rule_of_thumb_once(
    make: Callable[[], Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make()
    assert memory_files.markdown(memory).count(RULE_OF_THUMB) == 1
    *_, first, second = shown(memory, 80).splitlines()
    assert f"{first.strip()}\n{second.strip()}" == RULE_OF_THUMB_IN_SHORT
    for text in (RULE_OF_THUMB, RULE_OF_THUMB_IN_SHORT):
        for fact in (
            "Hu et al. 2021",
            "2 bytes a weight, 2 a gradient, 4 for Adam",
            "activations, logits, fp32 copies",
        ):
            assert fact in text.replace("\n", " ")
    drawn: list[str] = []
    text_of_figure = Figure.text
    monkeypatch.setattr(
        Figure, "text", lambda self, x, y, s, **how: (drawn.append(s), text_of_figure(self, x, y, s, **how))
    )
    memory_picture.png(memory)
    assert [" ".join(text.split()) for text in drawn].count(RULE_OF_THUMB) == 1


# Pictures


def png_size(data: bytes) -> tuple[int, ...]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def words(svg: str) -> list[str]:
    """Return the texts of an SVG element, which must be well-formed."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


@EVERY
def test_the_pictures_are_drawn(make: Callable[[], Memory]) -> None:
    memory = make()
    assert png_size(memory_picture.png(memory)) == (1950, 960)
    comparison = Comparison(memory)
    bars = words(memory_picture.bars_svg(memory))
    assert {row.label for row in comparison.rows} <= {label for label, _ in memory_picture.legend(memory)}
    for total in comparison.total.sizes:
        assert total is None or comparison.unit.number(total) in bars
    timeline = words(memory_picture.timeline_svg(memory))
    assert set(memory["forecast"]["phases"]) <= set(timeline)
    peak = comparison.unit.number(memory["forecast"]["total_bytes"])
    assert f"{'forecast' if memory['measured'] else 'peak'} {peak}" in timeline


def test_the_svg_uses_the_pages_colours_and_loads_nothing() -> None:
    for svg in (memory_picture.bars_svg(llama_7b()), memory_picture.timeline_svg(llama_7b())):
        assert "http" not in svg
        assert "<style" not in svg
        for colour, variable in pictures.VARIABLES.items():
            assert svg.count(colour) == svg.count(f"var({variable}, {colour})")
        assert {"--ink", "--muted", "--paper"} <= set(re.findall(r"var\((--\w+)", svg))
    fixed = {*memory_picture.COLOURS.values(), memory_picture.ON_DARK, memory_picture.ON_LIGHT}
    assert not fixed & set(pictures.VARIABLES), "a part has the same colour in light and dark mode"
    both = memory_picture.bars_svg(llama_7b()) + memory_picture.timeline_svg(llama_7b())
    ids = re.findall(r' id="([^"]*)"', both)
    assert {id.split("-")[0] for id in ids} == {"bars", "timeline"}, (
        "both must fit on one page without clashing ids"
    )
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', both)) <= set(ids)


def test_the_devices_memory_is_a_line_if_the_scale_reaches_it() -> None:
    near, far = llama_7b(capacity_bytes=21 * 2**29), llama_7b()
    for draw in (memory_picture.bars_svg, memory_picture.timeline_svg):
        assert any(word.endswith("dashed: the device)") for word in words(draw(near)))
        assert {"5", "10.5"} <= set(words(draw(near))), "a tick at 10 would be too near"
        assert not any("dashed" in word for word in words(draw(far)))


def test_a_name_is_escaped_whatever_it_contains() -> None:
    memory = llama_7b(capacity_bytes=10 * 2**30)
    memory["device"]["name"] = "$x_1^{$ & co"
    memory["forecast"]["timeline"]["phases"][0][1] = "</text><script>$x_1^{$"
    assert "</text><script>$x_1^{$" in words(memory_picture.timeline_svg(memory))
    assert png_size(memory_picture.png(memory)) == (1950, 960)


def test_many_phases_and_few_samples_can_be_drawn() -> None:
    memory = tiny()
    phases = ["forward", "loss", "backward"] * 16
    memory["forecast"]["timeline"]["phases"] = [[i, name] for i, name in enumerate(phases)]
    assert words(memory_picture.timeline_svg(memory)).count("forward") < 16, "names without room are left out"
    memory["forecast"] |= run_of({"working_set": 2**20}, samples=2)
    assert png_size(memory_picture.png(memory)) == (1950, 960)


def test_a_measurement_without_a_timeline_has_no_line() -> None:
    memory = llama_7b()
    memory["measured"]["timeline"] = None
    assert any(word.endswith("(forecast)") for word in words(memory_picture.timeline_svg(memory)))


def test_a_measured_phase_is_drawn_at_its_place_in_the_forecast() -> None:
    memory = tiny(0.0)
    timeline = memory["measured"]["timeline"]
    evaluation, _ = timeline["phases"].pop()
    timeline["parts"] = {part: [0, 0, *sizes[:evaluation]] for part, sizes in timeline["parts"].items()}
    timeline["phases"] = [[begin + 2, name] for begin, name in timeline["phases"]]
    forecast = memory_picture._spans(memory["forecast"]["timeline"])
    assert [name for name, _ in forecast] == ["forward", "loss", "backward", "update", "evaluation"]
    assert [name for name, _ in memory_picture._spans(timeline)] == [
        "",
        "forward",
        "loss",
        "backward",
        "update",
    ]
    axes = Lines()
    memory_picture._measured_line(axes, timeline, memory["forecast"]["timeline"])
    expected = [sum(sizes) for sizes in zip(*memory["forecast"]["timeline"]["parts"].values(), strict=True)]
    for xs, heights in axes.drawn[:3]:
        assert xs.tolist() == pytest.approx(range(round(xs[0]), round(xs[-1]) + 1))
        assert heights == expected[round(xs[0]) : round(xs[-1]) + 1]
    assert len(axes.drawn) == 4


class Lines:
    """Axes that record what is plotted."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def plot(self, xs: Any, heights: list[int], **_: Any) -> None:
        self.drawn.append((xs, heights))


def test_a_repeated_phase_is_a_separate_phase() -> None:
    timeline = {"phases": [[2, "forward"], [4, "loss"], [5, "forward"]], "parts": {"adapters": [0] * 8}}
    assert memory_picture._spans(timeline) == {
        ("", 0): (0, 2), ("forward", 0): (2, 4), ("loss", 0): (4, 5), ("forward", 1): (5, 7)
    }  # fmt: skip


@given(st.lists(st.floats(0, 100), min_size=1, max_size=13).map(sorted), st.floats(0.1, 10))
def test_labels_keep_their_order_and_distance(heights: list[float], gap: float) -> None:
    spread = memory_picture._spread(heights, gap)
    assert all(b - a >= gap * 0.999 for a, b in pairwise(spread))
    apart = all(b - a >= gap for a, b in pairwise(heights))
    if apart and heights[0] >= gap:
        assert spread == pytest.approx(heights), "labels must not move without need"


def test_labels_in_the_same_place_are_spread_to_both_sides() -> None:
    assert memory_picture._spread([50, 50, 50, 90], 2) == [48, 50, 52, 90]


# Files


def test_the_three_files_are_written(tmp_path: Path) -> None:
    memory = tiny()
    memory_files.write(tmp_path, memory)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["memory.json", "memory.md", "memory.png"]
    assert json.loads((tmp_path / "memory.json").read_text()) == memory
    assert (tmp_path / "memory.md").read_text() == memory_files.markdown(memory)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a"
    atomic.write(file, b"one")
    atomic.write(file, b"two")
    assert file.read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(SaveError, match=r"cannot write .*folder: Is a directory"):
        atomic.write(tmp_path / "folder", b"three")
    with pytest.raises(SaveError, match=r"cannot write .*missing/a: No such file"):
        atomic.write(tmp_path / "missing" / "a", b"three")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a", "folder"]
