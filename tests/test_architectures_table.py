"""The table of architectures: a complete record without a fault, its page, and the cells that still end like that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks.architectures import model_types, page, record, sweep, tiny
from benchmarks.faults.child import HANG, Ended
from qlora.errors import RecipeError

RECORD = record.read()
OTHER = transformers.__version__ not in {line["versions"]["transformers"] for line in RECORD.values()}
"""True for a version of transformers that is not that of the record"""


def line(name: str = "llama", **cells: tuple[str, str]) -> dict[str, Any]:
    found = {
        "write": ("works", ""),
        "estimate": ("works", "9 bytes"),
        "weights": ("works", "100%"),
        "train": ("works", ""),
        **cells,
    }
    return {
        "model": name, "class": f"{name.title()}ForCausalLM", "seconds": 1.0, "machine": "a machine", "commit": "abc",
        "versions": {"torch": "2", "transformers": "5", "bitsandbytes": "0"}, "date": "2026-11-30",
        "cells": {cell: {"kind": kind, "said": said} for cell, (kind, said) in found.items()},
    }  # fmt: skip


def test_the_record_has_every_causal_language_model_of_the_installed_transformers() -> None:
    missing = set(model_types.causal()) - set(RECORD)
    assert not missing, f"{sorted(missing)}: run python -m benchmarks.architectures"


def test_the_record_has_no_fault() -> None:
    assert page.faults(RECORD) == []


@pytest.mark.skipif(OTHER, reason="the page lists the model types of the recorded transformers")
def test_the_page_is_made_from_the_record() -> None:
    assert page.FILE.read_text() == page.text(RECORD), "run python -m benchmarks.architectures --page"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", RECORD)
def test_the_cells_of_a_model_end_as_the_record_says(name: str) -> None:
    if name not in model_types.causal():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    now = sweep.run(name)["cells"]
    recorded = {cell: one["kind"] for cell, one in RECORD[name]["cells"].items()}
    assert {cell: one["kind"] for cell, one in now.items()} == recorded, now


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", model_types.ENCODER),
        ("bart", model_types.ENCODER),  # transformers lists it as a masked language model first
        ("pegasus", model_types.SEQ_TO_SEQ),
        ("whisper", model_types.SEQ_TO_SEQ),
        ("gemma3", model_types.MULTIMODAL),
        pytest.param(
            "gemma4_assistant", model_types.DRAFTER, marks=pytest.mark.skipif(OTHER, reason="newer")
        ),
    ],
)
def test_a_model_type_that_is_no_causal_model_of_text_is_left_out_by_a_rule(name: str, why: str) -> None:
    assert model_types.others()[name] == why
    assert name not in model_types.causal()


def test_no_model_type_is_in_both_lists_or_in_none() -> None:
    names = {*model_types.causal(), *model_types.others()}
    assert len(names) == len(model_types.causal()) + len(model_types.others())
    assert {"llama", "qwen3_moe", "gemma3_text", "mamba", "gpt_oss", "deepseek_v3"} <= set(
        model_types.causal()
    )


def test_a_tiny_model_has_a_layer_of_each_kind() -> None:
    config = tiny.config("qwen3_next")
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert (config.num_hidden_layers, config.hidden_size, config.num_experts) == (2, 64, 4)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RecipeError("data.packing: no"), "refused", "data.packing: no"),
        (AssertionError("off by 3%"), "fault", "wrong: off by 3%"),
        (KeyError("layers"), "fault", "KeyError: 'layers' (test_architectures_table.py:"),
    ],
)
def test_a_cell_is_refused_by_a_message_and_faulty_for_any_other_error(
    error: Exception, kind: str, said: str
) -> None:
    def cell() -> str:
        raise error

    found, text = sweep.outcome(cell)
    assert found == kind
    assert text.startswith(said)
    assert sweep.outcome(lambda: "fine") == ("works", "fine")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Ended(HANG, "", ""), "no end within 5 s"),
        (Ended(-11, "", "Segmentation fault"), "code -11: Segmentation"),
    ],
)
def test_a_model_that_ends_its_process_has_a_fault_in_the_next_cell(
    monkeypatch: pytest.MonkeyPatch, end: Ended, said: str
) -> None:
    def ended(case: Callable[[], object], seconds: float) -> Ended:
        work: Path = case.args[1]  # type: ignore[attr-defined]
        (work / "cells.jsonl").write_text('["write", "works", ""]\n["estimate", "works", "1 byte"]\n')
        return end

    monkeypatch.setattr(sweep, "ended", ended)
    monkeypatch.setattr(record, "where", dict)
    cells = sweep.run("llama", 5)["cells"]
    assert [(cell, one["kind"]) for cell, one in cells.items()][-1] == ("weights", "fault")
    assert cells["weights"]["said"].startswith(said)


def test_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "REASONS", {"no gradient": "nothing learns"})
    monkeypatch.setattr(page, "MOST_REFUSED", 2)
    refused = {name: line(name, train=("refused", "there is no gradient")) for name in ("a", "b")}
    assert page.faults({"llama": line(), **refused}) == []
    assert page.faults({"llama": line(merged=("fault", "KeyError"))}) == ["llama, merged: KeyError"]
    assert page.faults({"llama": line(train=("refused", "no"))}) == ["llama: no written reason: no"]
    assert page.faults({**refused, "c": line("c", train=("refused", "no gradient"))}) == [
        "3 models are refused, more than 2"
    ]


def test_the_page_lists_what_is_refused_once_for_all_models_with_the_message() -> None:
    said = "data.packing: {}ForCausalLM leaks (a hidden state changes by 0.1 of its size). No"
    leaky = {name: line(name, packed=("refused", said.format(name.title()))) for name in ("one", "two")}
    mixture = line("three", weights=("works", "98%; routers of experts"))
    made = page.text({**leaky, "three": mixture})
    assert "- *packing*, one, two: data.packing: the model leaks. No" in made
    assert "| three | 98% |" in made
    assert "- routers of experts: three" in made
    assert "| one | 100% |  | yes | yes |  | refused |" in made


def test_a_model_has_one_line_in_the_record_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    file.write_text(json.dumps(line("qwen")) + "\n" + '{"model": "lla')
    record.add(file, line("llama"))
    record.add(file, line("qwen", merged=("refused", "no")))
    assert list(record.read(file)) == ["llama", "qwen"]
    assert len(file.read_text().splitlines()) == 2
    assert record.read(file)["qwen"]["cells"]["merged"]["kind"] == "refused"
