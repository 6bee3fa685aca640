"""`qlora compare`: the table, the mark of the best run, losses that cannot be compared, damaged runs, the picture."""

import json
import math
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import qlora

from qlora.recipe import Recipe
from qlora.report import run_curves
from qlora.report.run_comparison import compare
from qlora.report.run_files import read_runs
from qlora.tracking.record import Record

FIXTURES = Path(__file__).parent / "fixtures/version_1"


@cache
def recipe_text(*overrides: str) -> str:
    return Recipe.load("quickstart", ["training.max_steps=40", *overrides]).to_yaml()


def write_run(
    folder: Path,
    *overrides: str,
    losses: tuple[float, ...] = (7.0, 3.0, 2.0),
    held_out: str | None = "x",
    finished: bool = True,
    **result: Any,
) -> Path:
    """Write a run with an evaluation at each tenth step, as the tracker and the training write it."""
    folder.mkdir(parents=True)
    last = 10 * (len(losses) - 1)
    (folder / "recipe.yaml").write_text(recipe_text(*overrides))
    (folder / "run.json").write_text(json.dumps({"run_id": folder.name}))
    record = Record(folder / "metrics.jsonl")
    for step in range(last + 1):
        if step:
            numbers = {"loss": 7 / step, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1000.0 + step}
            record.step({"step": step, **numbers, "tokens": 350, "supervised_tokens": 140})
        if step % 10 == 0:
            loss = losses[step // 10]
            record.evaluation({"step": step, "eval_loss": loss, "eval_tokens": 9, "peak_memory_bytes": 2**29})
    record.finish({})
    facts = {
        "data": {"held_out_sha256": held_out},
        "device": {"name": "CPU, tested"},
        "memory": {"forecast_bytes": 2**25},
        "steps": {"total_steps": 20},
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    if finished:
        outcome = {
            "steps": last, "total_steps": last, "seconds": 100.0, "loss_before": losses[0],
            "loss_after": losses[-1], "result_step": last, "run_id": folder.name, "facts": facts, **result,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(outcome))
        part = {"total_bytes": 3 * 2**24, "peak": "backward", "parts": {}}
        memory = {"forecast": {**part, "total_bytes": 2**25}, "measured": part}
        (folder / "memory.json").write_text(json.dumps(memory))
    return folder


def compared(*folders: Path) -> dict[str, Any]:
    done = qlora("compare", *folders, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_table_has_the_keys_that_differ_and_the_outcomes(tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", "optimizer.lr=1e-3", losses=(7.0, 5.0, 4.0))
    fast = write_run(tmp_path / "fast", "optimizer.lr=2e-3", "adapter.rank=4", losses=(7.0, 1.5, 2.0))
    done = qlora("compare", slow, fast)
    head, names, *rows = done.stdout.splitlines()[:4]
    assert names.split() == [
        "run", "rank", "lr", "steps", "before", "after", "lowest", "step", "after", "MiB", "MiB", "a", "second",
        "time", "status",
    ]  # fmt: skip
    assert head.split()[:2] == ["adapter.", "optimizer."]
    outcome = "32.00 48.00 1,010 1 min 40 s finished"
    assert [" ".join(row.split()) for row in rows] == [
        f"slow 16 0.001 20 7.0000 4.0000 4.0000 20 54.6 {outcome}",
        f"fast * 4 0.002 20 7.0000 2.0000 1.5000 10 7.389 {outcome}",
    ]
    assert "the same in all runs: base bundled/base, method lora\n" in done.stdout
    assert "peak memory is that of the run's own parts, in backward" in done.stdout
    assert done.stderr == ""


def test_a_setting_without_effect_in_a_run_has_no_value(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", f"adapter.from={first}")
    settings = {run["name"]: run["settings"] for run in compared(first, second)["runs"]}
    assert settings == {"first": {"adapter.from": None}, "second": {"adapter.from": str(first)}}
    third = write_run(tmp_path / "third", "adapter.rank=4")
    rows = {
        line.split()[0]: line for line in qlora("compare", first, second, third).stdout.splitlines() if line
    }
    assert [" – " in rows[name] for name in ("first", "second", "third")] == [False, True, False]


def test_json_has_the_numbers_and_marks_the_best(tmp_path: Path) -> None:
    worse = write_run(tmp_path / "a/run", "adapter.method=bitfit", losses=(7.0, 5.0, math.nan))
    better = write_run(tmp_path / "b/run", losses=(7.0, 2.5, 3.0), loss_after=2.5, result_step=10)
    going = write_run(tmp_path / "c/run", losses=(7.0, 1.0), finished=False)
    other = write_run(tmp_path / "d/run")
    found = compared(worse, better, going, other, tmp_path / "b/../b/run")
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == ["a/run", "b/run", "c/run", "d/run"], "the shortest names that differ, each run once"
    assert [run["best"] for run in runs.values()] == [False, False, False, True]
    assert found["comparable"]
    assert runs["a/run"]["loss"] == "nan"
    assert runs["a/run"]["method"] == "bitfit"
    assert "adapter.method" not in found["keys"]
    assert (runs["b/run"]["loss"], runs["b/run"]["loss_step"], runs["b/run"]["lowest_step"]) == (2.5, 10, 10)
    expected = {
        "status": "unfinished", "steps": 10, "total_steps": 20, "loss": 1.0, "loss_step": 10,
        "forecast_bytes": 2**25, "measured_bytes": None, "rows": "A",
    }  # fmt: skip
    assert {key: runs["c/run"][key] for key in expected} == expected
    assert runs["c/run"]["seconds"] == pytest.approx(sum(350 / (1000 + step) for step in range(1, 11)))


def test_losses_on_other_rows_are_marked_and_not_ranked(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "training.seed=1", "data.held_out=4", held_out="x", losses=(7.0, 3.0)),
        write_run(tmp_path / "b", "training.seed=2", "data.held_out=4", held_out="y", losses=(7.0, 2.0)),
        write_run(tmp_path / "c", "training.seed=1", "data.held_out=4", held_out="x", losses=(7.0, 4.0)),
        write_run(tmp_path / "d", "training.seed=3", "data.held_out=4", held_out=None, losses=(7.0, 1.0)),
    ]
    found = compared(*runs)
    assert [run["rows"] for run in found["runs"]] == ["A", "B", "A", "C"]
    assert [run["best"] for run in found["runs"]] == [True, False, False, False], (
        "only runs of A have a rival"
    )
    assert not found["comparable"]
    about, unknown, seeds = found["notes"]
    assert "not all comparable" in about
    assert "(these settings differ: training.seed)" in about
    assert unknown.startswith("d: no digest of the held-out rows is recorded")
    assert "set data.held_out to a file of rows" in seeds
    done = qlora("compare", *runs)
    assert "note  the held-out losses are not all comparable" in done.stderr
    assert "with the same letter" in done.stdout


def test_runs_before_the_digest_of_held_out_rows_are_known_by_the_manifest_of_their_results(
    tmp_path: Path,
) -> None:
    from qlora.storage import manifest

    runs = [write_run(tmp_path / name, held_out=None) for name in "ab"]
    runs.append(write_run(tmp_path / "c", held_out="x"))
    for run in runs:
        (run / "adapter").mkdir()
        manifest.write(run / "adapter", data="all rows")
    assert compared(*runs)["comparable"]
    manifest.write(runs[1] / "adapter", data="other rows")
    assert [run["rows"] for run in compared(*runs)["runs"]] == ["A", "B", "A"]


DAMAGE = [
    ("result.json", "{", "unfinished, damaged", "result.json: damaged (Expecting"),
    ("result.json", '{"steps": "many"}', "unfinished, damaged", "result.json: a value is missing or wrong"),
    ("result.json", '{"run_id": "z"}', "unfinished, damaged", "result.json: belongs to another run"),
    ("recipe.yaml", "base: [", "finished, damaged", "recipe.yaml:1"),
    ("recipe.yaml", "version: 99\n", "finished, damaged", "was written by a newer qlora"),
    ("recipe.yaml", None, "finished, damaged", "recipe.yaml"),
    ("memory.json", "[]", "finished, damaged", "memory.json: damaged (not a JSON object)"),
    ("run.json", None, "finished, damaged", "run.json: missing"),
    ("metrics.jsonl", None, "finished, damaged", "metrics.jsonl: missing"),
    ("run.json", '{"run_id": "a", "starting": true}', "not begun", None),
    ("facts.json", '{"data": 3, "memory": [], "steps": {"total_steps": "x"}}', "finished", None),
]


def test_damaged_runs_are_shown_as_such(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "whole")]
    for number, (file, content, _, _) in enumerate(DAMAGE):
        runs.append(shutil.copytree(runs[0], tmp_path / f"damaged-{number}"))
        if content is None:
            (runs[-1] / file).unlink()
        else:
            (runs[-1] / file).write_text(content)
    found = compared(*runs)
    assert [run["status"] for run in found["runs"]] == ["finished", *(status for _, _, status, _ in DAMAGE)]
    for folder, (_, _, _, note) in zip(runs[1:], DAMAGE, strict=True):
        notes = [line for line in found["notes"] if str(folder) in line]
        assert [note in line for line in notes] == ([] if note is None else [True]), notes
    assert len(qlora("compare", *runs).stdout.splitlines()) > len(runs)


def test_runs_of_an_earlier_version_and_stopped_runs_are_named() -> None:
    runs = compared(FIXTURES / "finished", FIXTURES / "interrupted")["runs"]
    assert [run["status"] for run in runs] == ["finished, earlier version", "stopped, earlier version"]
    assert runs[0]["loss"] == pytest.approx(5.661632650702662)


def test_speeds_of_different_devices_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    facts = json.loads((runs[1] / "facts.json").read_text())
    (runs[1] / "facts.json").write_text(json.dumps({**facts, "device": {"name": "GPU"}}))
    assert compared(*runs)["notes"] == [
        "speed, time and memory come from different devices. CPU, tested: a; GPU: b"
    ]


def test_folders_without_a_run_are_named_all_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "adapter").mkdir()
    (tmp_path / "file").write_text("")
    done = qlora("compare", run, tmp_path / "missing", run / "adapter", tmp_path / "file", tmp_path)
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        f"qlora: {tmp_path}/missing: no such folder. Pass folders of runs, for example runs/quickstart",
        f"{run}/adapter: is the result of a run, not the run. Pass {run}",
        f"{tmp_path}/file: no run here. Pass folders of runs, for example runs/quickstart",
        f"{tmp_path}: no run here. Pass folders of runs, for example runs/quickstart",
    ]


def test_a_picture_is_written_whole_and_never_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, picture = write_run(tmp_path / "run"), tmp_path / "losses.png"
    done = qlora("compare", run, "--picture", picture)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = picture.read_bytes()
    assert "already exists" in qlora("compare", run, "--picture", picture).stderr
    assert picture.read_bytes() == before
    assert "ends in .png, .svg, .pdf" in qlora("compare", run, "--picture", tmp_path / "a.jpg").stderr
    monkeypatch.setattr(run_curves, "draw", lambda *_: b"drawn")
    empty = write_run(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    assert "no run has a loss yet" in qlora("compare", empty, "--picture", tmp_path / "b.png").stderr

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora.storage.atomic.sync", interrupted)
    done = qlora("compare", run, "--picture", tmp_path / "c.svg")
    assert done.returncode == 128 + signal.SIGINT
    assert {path.name for path in tmp_path.iterdir()} == {"run", "empty", "losses.png"}


def test_curves_are_drawn_over_tokens_if_steps_differ(tmp_path: Path) -> None:
    same = compare(
        read_runs([write_run(tmp_path / name, f"optimizer.lr={name}") for name in ("1e-3", "2e-3")])
    )
    larger = write_run(tmp_path / "larger", "training.global_batch_size=16")
    other = compare(read_runs([tmp_path / "1e-3", larger]))
    assert [same.same_steps, other.same_steps] == [True, False]
    text = run_curves.draw(other, "svg")
    assert b"tokens trained on" in text
    assert b"6,000" in text, "tokens, not steps"


def test_at_most_ten_runs_have_a_colour_and_they_are_the_best(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"r{n:02}", losses=(7.0, 3.0 - n / 100)) for n in range(12)]
    text = run_curves.draw(compare(read_runs(folders)), "svg").decode()
    assert "tokens trained on" not in text
    assert [f"r{n:02}" in text for n in range(12)] == [False, False, *[True] * 10]
    assert "2 others" in text
    assert "r11 *" in text
    assert {colour for colour in run_curves.COLOURS if colour in text} == set(run_curves.COLOURS)
    assert len(set(run_curves.MARKERS)) == run_curves.MOST
