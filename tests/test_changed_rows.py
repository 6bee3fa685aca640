"""Rows that changed after a training: an evaluation says that it can hold out rows that were trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import bundled
from qlora.inference.load import held_out_loss, load_trained
from qlora.merging.merge import merge
from qlora.recipe import Recipe
from qlora.training.train import train


@pytest.mark.usefixtures("without_forecast")
def test_an_evaluation_and_a_merge_warn_of_other_rows(
    recipe_file: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, source = tmp_path / "rows.jsonl", bundled.path("bundled/tickets/train.jsonl")
    rows.write_text("".join(source.read_text().splitlines(keepends=True)[:24]))
    done = train(
        Recipe.load(recipe_file(data={"source": str(rows), "limit": None}, training={"max_steps": 1})),
        terminal=False,
    )
    first = held_out_loss(load_trained(done.run))
    merge(done.run, tmp_path / "one", onto="original")
    assert "not those of the training" not in caplog.text
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    assert held_out_loss(load_trained(done.run)) != first
    assert caplog.text.count(f"{rows}: the rows are not those of the training") == 1
    merge(done.run, tmp_path / "two", onto="original")
    assert caplog.text.count("not those of the training") == 2
    merge(done.run, tmp_path / "three", onto="original", data=str(rows))
    file = done.run / "adapter/manifest.json"
    manifest = json.loads(file.read_text())
    assert len(manifest["data"]) == 64
    file.unlink()  # an adapter of PEFT
    held_out_loss(load_trained(done.run))
    assert caplog.text.count("not those of the training") == 2
