"""Several sources: shares of an epoch, the order as a pure function, and the same runs as before with one source."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level

from qlora.data import Batches, Dataset, Prompts, load_dataset
from qlora.data.mixture import Share, epoch_rows, shares
from qlora.errors import DataError, RecipeError
from qlora.recipe import Data, Recipe

TOKENIZER = byte_level(bos=True, pad="</s>")


def write(file: Path, count: int, **fields: str) -> str:
    fields = fields or {"prompt": f"{file.stem} {{n}}?", "completion": " {n}"}
    rows = [{name: text.format(n=n) for name, text in fields.items()} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def section(*sources: dict[str, Any], **keys: Any) -> Data:
    defaults = {"format": "prompt-completion", "max_length": 64, "held_out": 0}
    recipe = {"base": {"model": "bundled/base"}, "data": {**defaults, **keys, "sources": list(sources)}}
    return Recipe.from_dict(recipe).data


def batches(dataset: Dataset, **keys: Any) -> Batches:
    arguments = {"micro_batch_size": 2, "global_batch_size": 4, "max_length": 64, "packing": False, "seed": 0}
    return Batches(dataset.train, pad_id=dataset.pad_id, mixture=dataset.mixture, **{**arguments, **keys})


def origins(batches: Batches, epoch: int) -> list[str]:
    """Return the origins of an epoch's rows, in order."""
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    rows = [row for step in steps for micro_batch in batches.step_rows(step) for row in micro_batch]
    return [Path(batches.examples[index].origin).name for row in rows for index in batches.rows[row]]


def by_source(origins: list[str]) -> dict[str, int]:
    return dict(Counter(origin.partition(".")[0] for origin in origins))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=4),
    st.integers(0, 2**40),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=50)
def test_every_row_of_a_source_is_used_equally_often(
    pairs: list[tuple[int, int]], seed: int, epochs: int
) -> None:
    mixture = [Share(*pair) for pair in pairs]
    used = np.concatenate([epoch_rows(mixture, seed, epoch) for epoch in range(epochs)])
    start = 0
    for share in mixture:
        counts = np.bincount(
            used[(used >= start) & (used < start + share.total)] - start, minlength=share.total
        )
        assert counts.sum() == epochs * share.per_epoch
        assert counts.max() - counts.min() <= 1
        start += share.total
    assert np.array_equal(epoch_rows(mixture, seed, 3), epoch_rows(mixture, seed, 3))


def test_weights_share_an_epoch_of_all_rows() -> None:
    assert [share.per_epoch for share in shares([10, 90], [1.0, 1.0], [None, None])] == [50, 50]
    assert [share.per_epoch for share in shares([10, 90, 1], [2.0, 1.0, 4.0], [None] * 3)] == [29, 14, 58]
    assert [share.per_epoch for share in shares([10, 90], [None, None], [None, 5])] == [10, 5]


def test_sources_are_mixed_by_weight_and_by_rows(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 10)
    dataset = load_dataset(section({"source": a, "weight": 1}, {"source": b, "weight": 3}), TOKENIZER, 0)
    mixed = batches(dataset)
    assert mixed.steps_per_epoch == 10
    assert [by_source(origins(mixed, epoch)) for epoch in range(2)] == [{"a": 10, "b": 30}] * 2
    three = [origin for epoch in range(3) for origin in origins(mixed, epoch)]
    assert set(Counter(three).values()) == {1, 9}  # each of the 30 rows of a once, each of b 9 times
    assert [source["per_epoch"] for source in dataset.counts.sources] == [10, 30]
    assert [source["read"] for source in dataset.counts.sources] == [30, 10]

    counted = load_dataset(section({"source": a, "rows": 6}, {"source": b}), TOKENIZER, 0)
    assert by_source(origins(batches(counted), 4)) == {"a": 6, "b": 10}
    assert counted.fingerprint != dataset.fingerprint
    assert (
        load_dataset(section({"source": a, "rows": 6}, {"source": b}), TOKENIZER, 0).mixture
        == counted.mixture
    )


def test_any_step_can_be_built_first(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 9), write(tmp_path / "b.jsonl", 5)
    dataset = load_dataset(section({"source": a, "weight": 1}, {"source": b, "weight": 1}), TOKENIZER, 0)
    for packing in (False, True):
        forwards, backwards = batches(dataset, packing=packing), batches(dataset, packing=packing)
        steps = range(5 * forwards.steps_per_epoch)
        expected = [forwards.step_rows(step) for step in steps]
        assert [backwards.step_rows(step) for step in reversed(steps)] == expected[::-1]


def test_a_packed_row_has_one_source_and_the_shares_are_of_packed_rows(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 20)
    mixed = batches(
        load_dataset(section({"source": a, "rows": 20}, {"source": b, "rows": 40}), TOKENIZER, 0),
        packing=True,
    )
    sources = [{Path(mixed.examples[index].origin).name[0] for index in row} for row in mixed.rows]
    assert all(len(row) == 1 for row in sources)
    of_a = sources.count({"a"})
    assert 0 < of_a < len(mixed.rows)
    assert mixed.rows_per_epoch == round(of_a / 2) + 2 * (len(mixed.rows) - of_a)


def test_sources_without_shares_are_one_data_set(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 6), write(tmp_path / "b.jsonl", 4)
    both = tmp_path / "both.jsonl"
    both.write_text(Path(a).read_text() + Path(b).read_text())
    several = load_dataset(section({"source": a}, {"source": b}, held_out=3), TOKENIZER, 0)
    one = load_dataset(
        Data(source=str(both), format="prompt-completion", max_length=64, held_out=3), TOKENIZER, 0
    )
    assert several.fingerprint == one.fingerprint
    assert several.mixture == ()
    assert batches(several).step_rows(5) == batches(one).step_rows(5)
    assert sum(source["held_out"] for source in several.counts.sources) == 3
    assert [(prompt.text, prompt.reference) for prompt in several.prompts] == [
        (prompt.text, prompt.reference) for prompt in one.prompts
    ]


def test_each_source_has_its_own_format_template_and_columns(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    chat.write_text(json.dumps({"messages": messages}) + "\n")
    pairs = write(tmp_path / "pairs.jsonl", 1, q="question {n}", a="answer {n}")
    chosen = section(
        {"source": str(chat), "format": "messages", "template": "plain"},
        {"source": pairs, "columns": {"prompt": "q", "completion": "a"}},
        format="prompt-completion",
        columns={"prompt": "other"},
    )
    dataset = load_dataset(chosen, TOKENIZER, 0)
    texts = [TOKENIZER.decode(example.input_ids) for example in dataset.train]
    assert texts == ["<s>Question: Q\nAnswer: A</s>", "<s>question 0answer 0</s>"]
    # a question is posed in the layout of the first source
    assert TOKENIZER.decode(Prompts(chosen, TOKENIZER).encode("Why?")) == "<s>Question: Why?\nAnswer:"


def test_a_source_without_usable_rows_is_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", 3)
    empty = write(tmp_path / "empty.jsonl", 0)
    with pytest.raises(DataError, match=r"empty\.jsonl: the source has no rows"):
        load_dataset(section({"source": a}, {"source": empty}), TOKENIZER, 0)
    b = write(tmp_path / "b.jsonl", 1)
    chosen = section({"source": b, "weight": 1}, {"source": b, "weight": 1}, held_out=1)
    with pytest.raises(DataError, match=r"b\.jsonl: all usable rows are held out"):
        load_dataset(chosen, TOKENIZER, 0)


A = {"source": "a.jsonl"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "a.jsonl", "sources": [A]}, "data.sources: and data.source are both set; leave one"),
        ({"sources": []}, "data.source: is required: A file, a folder"),
        ({"sources": [{**A, "weight": 1}, A]}, "some sources have a weight, so give each of them one"),
        ({"sources": [{**A, "weight": 1, "rows": 2}]}, "a source has a weight and a number of rows"),
        (
            {"sources": [{**A, "columns": {"promt": "x"}}]},
            "data.sources: the alpaca format has no field 'promt'",
        ),
        ({"sources": [{"weight": 1}]}, "data.sources[0].source: is required: A file"),
        ({"sources": [{**A, "wieght": 1}]}, "data.sources[0].wieght: unknown key; did you mean 'weight'?"),
        ({"sources": "a.jsonl"}, "data.sources: must be a list, each item a mapping with the keys source"),
        ({"source": "a", "too_long": "split"}, "data.too_long: split needs a format of plain text"),
    ],
)
def test_contradictions_between_sources_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Recipe.from_dict({"base": {"model": "m"}, "data": data})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dash_on_the_command_line_is_the_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: {model: m}\ndata: {source: a.jsonl}\n")
    assert Recipe.load(file, ["data.source=-"]).data.source == "-"


def test_an_override_replaces_one_kind_of_source_by_the_other(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: {model: m}\ndata: {sources: [{source: a.jsonl}]}\n")
    assert Recipe.load(file, ["data.source=b.jsonl"]).data.names == "b.jsonl"
    file.write_text("base: {model: m}\ndata: {source: a.jsonl}\n")
    changed = Recipe.load(file, ["data.sources=[{source: b.jsonl, weight: 2}, {source: c.jsonl, weight: 1}]"])
    assert changed.data.names == "b.jsonl, c.jsonl"
    file.write_text(changed.to_yaml())
    assert Recipe.load(file) == changed
