"""Cards by name: spellings, ambiguous and unknown names, and plausible sizes."""

import pytest
from commands_for_tests import qlora

from qlora.errors import UsageError
from qlora.memory.gpus import CARDS, capacity_bytes, computes_bfloat16, find, smallest
from qlora.recipe import Recipe


@pytest.mark.parametrize("name", ["4090", "rtx4090", "RTX-4090", "rtx_4090", "NVIDIA GeForce RTX 4090"])
def test_spellings_of_a_name_are_the_same_card(name: str) -> None:
    assert find(name).name == "RTX 4090"
    assert capacity_bytes(name) == int(23.61 * 2**30)


@pytest.mark.parametrize(
    ("name", "card"),
    {
        "h100": "H100 80GB", "a100-80gb": "A100 80GB", "A100 40": "A100 40GB", "Tesla T4": "T4", "a5000": "RTX A5000",
        "6000 ada": "RTX 6000 Ada", "l40s": "L40S", "v100": "V100 32GB", "H100-NVL": "H100 NVL",
    }.items(),
)  # fmt: skip
def test_short_and_long_names_are_found(name: str, card: str) -> None:
    assert find(name).name == card


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a100", "A100 40GB or A100 80GB"),
        ("rtx 4080", r"did you mean .*RTX 4090"),
        ("24 bananas", "such as 24GiB"),
        ("", "such as 24GiB"),
    ],
)
def test_other_names_get_an_answer(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        capacity_bytes(name)


def test_a_size_is_taken_as_it_is() -> None:
    assert capacity_bytes("24GiB") == 24 * 2**30
    assert capacity_bytes("80GB") == 80 * 10**9


def test_a_process_gets_less_than_the_chips_have() -> None:
    for card in CARDS:
        assert 0.88 * card.marketed_gb * 2**30 < card.memory_bytes < card.marketed_gb * 2**30, card
        assert card.source.startswith("https://github.com/"), card
        assert find(card.name) is card


def test_old_cards_have_no_bfloat16() -> None:
    assert [card.name for card in CARDS if not card.bfloat16] == ["RTX 8000", "T4", "V100 32GB"]
    assert not computes_bfloat16("tesla t4")
    assert computes_bfloat16("16GiB")
    assert computes_bfloat16("4090")
    card = smallest(int(14.3 * 2**30))  # a forecast in bfloat16: the T4 would need more
    assert card is not None
    assert card.name == "RTX 5080"


def test_estimate_for_an_old_card_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def estimated(recipe: Recipe, *_: object) -> None:
        asked.append(recipe.base.compute_dtype)
        raise UsageError("enough")

    monkeypatch.setattr("qlora.memory.estimate.estimate", estimated)
    for card, setting in (("t4", "auto"), ("t4", "bfloat16"), ("4090", "auto")):
        done = qlora("estimate", "quickstart", f"base.compute_dtype={setting}", "--gpu", card)
        assert ("t4 has no bfloat16" in done.stderr) == (asked[-1] == "float32")
    assert asked == ["float32", "bfloat16", "auto"]


def test_estimate_lists_the_cards_without_a_recipe() -> None:
    done = qlora("estimate", "--gpu", "list")
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == [card.name for card in CARDS]
