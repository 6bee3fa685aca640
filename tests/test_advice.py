"""Advice compares a recipe with published findings, names their source, and gives none for small models."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from qlora.recipe import Recipe
from qlora.recipe.evidence import (
    BATCH,
    CAPACITY,
    FINDINGS,
    FULL_RATE,
    LORA_RATE,
    MEASURED_FULL_RATES,
    MEASURED_LORA_RATES,
    TARGETS,
    Finding,
)
from qlora.training.advice import Advice, advise

PAGE = Path(__file__).parent.parent / "docs" / "explanations" / "advice.md"


def advice(
    tokens: int = 1_000_000,
    trained: int = 2_000_000,
    size: int = 7 * 10**9,
    adapter_parameters: int | None = None,
    **sections: Any,
) -> Advice:
    settings = {"base": {"model": "some/model"}, "data": {"source": "rows.jsonl"}, **sections}
    own = trained if adapter_parameters is None else adapter_parameters
    return advise(Recipe.from_dict(settings), tokens, size, trained, own)


def suggested(found: Advice) -> list[str]:
    return [text for label, text in found.rows() if label == "advice"]


def test_the_default_recipe_is_as_published_findings_suggest() -> None:
    [line] = suggested(advice())
    assert line.startswith("rank, targets, learning rate and batch are as published findings suggest")
    assert dict(advice().rows())["capacity"] == (
        "LoRA of rank 8 on all-linear: 2,000,000 parameters for 1,000,000 trained tokens, 2.00 a token"
    )


@pytest.mark.parametrize(
    ("arguments", "finding", "words"),
    [
        ({"tokens": 5_000_000}, CAPACITY, "adapter.rank=32 has"),  # 8 · 5 / 2 = 20
        ({"tokens": 2_000_001}, CAPACITY, "adapter.rank=16 has"),
        ({"tokens": 10**9}, CAPACITY, "no rank up to 256 has"),
        ({"adapter": {"targets": "attention"}}, TARGETS, "adapter.targets=all-linear"),
        ({"optimizer": {"lr": 2e-5}}, LORA_RATE, "optimizer.lr=2e-05 is below 0.0001 to 0.0005"),
        ({"optimizer": {"lr": 6e-4}}, LORA_RATE, "optimizer.lr=0.0006 is above"),
        (
            {"adapter": {"method": "full"}, "base": {"model": "m", "quantization": "none"}},
            FULL_RATE,
            "optimizer.lr=0.0002 is above 1e-05 to 5e-05",
        ),
        ({"training": {"global_batch_size": 256}}, BATCH, "a step of 256 rows"),
    ],
)
def test_each_finding_is_applied_and_named(arguments: dict[str, Any], finding: Finding, words: str) -> None:
    [line] = suggested(advice(**arguments))
    assert line.startswith(words)
    assert line.endswith(f"Found on {finding.models}: {finding.claim} ({finding.source})")


def test_enough_parameters_need_no_other_rank() -> None:
    assert not advice(tokens=2_000_000).suggestions


def test_a_small_base_gets_no_advice() -> None:
    found = advice(size=999_999_999, tokens=10**9, optimizer={"lr": 1e-2}, adapter={"targets": "attention"})
    [line] = suggested(found)
    assert line.startswith("none: published comparisons begin at 1B parameters, and this base has ")


def test_a_base_of_the_measured_size_is_shown_what_was_measured() -> None:
    shown = dict(advice(size=3_000_000).rows())
    assert (
        "LoRA learned best at learning rates of 0.004 to 0.008, full fine-tuning at 0.00025"
        in shown["measured"]
    )
    assert "measured" not in dict(advice(size=100_000_000).rows())


@pytest.mark.parametrize(
    ("experiment", "rates"), [("lr-lora", MEASURED_LORA_RATES), ("lr-full", MEASURED_FULL_RATES)]
)
def test_what_is_said_to_be_measured_is_in_the_report(experiment: str, rates: tuple[float, float]) -> None:
    report = Path(__file__).parents[1] / "benchmarks/reports/methods.json"
    found = json.loads(report.read_text())["experiments"][experiment]
    losses = {
        row["setting"]["keys"]["optimizer.lr"]: fmean(row["loss_after"].values())
        for row in found.values()
        if not row["screening_only"]
    }
    assert sorted(sorted(losses, key=losses.__getitem__)[:2]) == list(rates)


def test_a_rank_is_no_matter_of_biases() -> None:
    assert not advice(tokens=10**9, adapter={"method": "bitfit"}, optimizer={"lr": 1e-2}).suggestions


def test_a_rank_is_suggested_where_parameters_grow_with_it() -> None:
    adalora: dict[str, Any] = {"method": "adalora", "rank": 8}
    with_budget = {**adalora, "budget": {"initial_rank": 24}}
    wanted = [
        ({"adapter": {"method": "vera", "rank": 256}}, None),
        ({"adapter": {"rank_pattern": {"q_proj": 64}}}, None),
        ({"adapter": {"method": "dora"}}, "adapter.rank=32 has"),
        ({"adapter": adalora}, "adapter.rank=32 has"),  # 12 · 5 / 2 = 30
        ({"adapter": with_budget}, "adapter.rank=64 adapter.budget.initial_rank=192 has"),  # 24 · 5 / 2 = 60
        (
            {"adapter": {"train_modules": ["lm_head"]}, "trained": 10**8, "adapter_parameters": 2_000_000},
            "adapter.rank=32 has",
        ),
    ]
    for arguments, words in wanted:
        lines = [line for line in advice(tokens=5_000_000, **arguments).suggestions if "adapter.rank" in line]
        assert [line[: len(words or "")] for line in lines] == ([words] if words else []), arguments
    kept = advice(tokens=1_500_000, adapter=adalora).suggestions  # at the end 2/3 of the parameters are left
    assert any(line.startswith("adapter.rank=16 has") for line in kept)


def test_the_page_has_the_table() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"| `{f.key}` | {f.claim} | {f.source} | {f.models} |" for f in FINDINGS]
