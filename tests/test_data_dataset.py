"""A recipe's data section becomes examples: splits, lengths, counts, and files full of mistakes."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, sentencepiece, words

from qlora.data import IGNORE_INDEX, Batches, Dataset, encode_prompt, load_dataset
from qlora.data.order import permutation
from qlora.errors import DataError
from qlora.recipe import Data

TOKENIZER = byte_level(bos=True, pad="</s>")


def load(source: Path | str, seed: int = 0, tokenizer: Any = TOKENIZER, **section: Any) -> Dataset:
    arguments = {"format": "prompt-completion", "max_length": 64, "held_out": 0, **section}
    return load_dataset(Data(source=str(source), **arguments), tokenizer, seed)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {number}?", "completion": f" {number * 7}"} for number in range(count)]


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", pairs(100))


def origins(examples: list[Any]) -> list[int]:
    return [int(example.origin.rpartition(":")[2]) for example in examples]


@given(held_out=st.one_of(st.integers(0, 99), st.floats(0.001, 0.999)), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=30)
def test_train_and_held_out_share_no_row_and_lose_none(
    hundred: Path, held_out: int | float, seed: int
) -> None:
    dataset = load(hundred, seed, held_out=held_out)
    train, kept_back = origins(dataset.train), origins(dataset.held_out)
    assert sorted(train + kept_back) == list(range(1, 101))
    assert train == sorted(train)
    wanted = held_out if isinstance(held_out, int) else min(99, max(1, round(100 * held_out)))
    assert len(kept_back) == len(dataset.prompts) == wanted


def test_the_split_is_stable_by_seed(hundred: Path) -> None:
    first, again, other = (load(hundred, seed, held_out=20) for seed in (1, 1, 2))
    assert origins(first.held_out) == origins(again.held_out) != origins(other.held_out)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    # and it is independent of the order of any epoch
    assert set(origins(first.held_out)) != set((permutation(100, 1, 0)[:20] + 1).tolist())


def test_a_second_source_is_held_out_as_a_whole(hundred: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "second.jsonl", pairs(7))
    dataset = load(hundred, held_out=str(second), limit=20)
    assert (len(dataset.train), len(dataset.held_out)) == (20, 7)
    assert dataset.held_out[0].origin == f"{second}:1"
    assert dataset.counts.held_out_seen == 7
    assert dataset.counts.read == 27


def test_rows_in_memory_are_trained_and_the_held_out_file_is_read(tmp_path: Path) -> None:
    second = write(tmp_path / "second.jsonl", pairs(7))
    section = Data(source="memory", format="prompt-completion", max_length=64, held_out=str(second))
    dataset = load_dataset(section, TOKENIZER, 0, rows=pairs(5))
    assert [example.origin for example in dataset.train] == [f"memory:row {row}" for row in range(1, 6)]
    assert [example.origin for example in dataset.held_out] == [f"{second}:{row}" for row in range(1, 8)]
    assert len(dataset.prompts) == 7
    with pytest.raises(DataError, match=r"^rows: the list is empty"):
        load_dataset(section, TOKENIZER, 0, rows=[])


def test_the_fingerprint_depends_only_on_what_is_trained(hundred: Path, tmp_path: Path) -> None:
    rows = pairs(100)
    reference = load(hundred).fingerprint
    assert load(write(tmp_path / "a.jsonl", rows)).fingerprint == reference
    assert load(hundred, max_length=512).fingerprint == reference
    changed = [*rows[:-1], {**rows[-1], "completion": " 0"}]
    others = [
        load(write(tmp_path / "b.jsonl", changed)),
        load(write(tmp_path / "c.jsonl", rows[::-1])),
        load(hundred, train_on="all"),
        load(hundred, tokenizer=byte_level()),
        load(hundred, held_out=1),
    ]
    assert len({reference, *(other.fingerprint for other in others)}) == 6


def test_the_digest_of_held_out_rows_depends_on_nothing_else(hundred: Path, tmp_path: Path) -> None:
    second = str(write(tmp_path / "second.jsonl", pairs(7)))
    reference = load(hundred, held_out=second).held_out.sha256
    assert load(hundred, held_out=second, limit=20).held_out.sha256 == reference
    others = [
        load(hundred, held_out=second, train_on="all"),
        load(hundred, held_out=second, tokenizer=byte_level()),
        load(hundred, held_out=7),
        load(hundred, held_out=str(write(tmp_path / "third.jsonl", pairs(8)))),
    ]
    assert len({reference, *(other.held_out.sha256 for other in others)}) == 5


def test_limit_takes_the_first_rows(hundred: Path) -> None:
    assert origins(load(hundred, limit=5).train) == [1, 2, 3, 4, 5]


def test_prompts_contain_the_question_without_the_answer(hundred: Path) -> None:
    dataset = load(hundred, held_out=3)
    for prompt, example in zip(dataset.prompts, dataset.held_out, strict=True):
        number = int(prompt.origin.rpartition(":")[2]) - 1
        assert (prompt.text, prompt.reference) == (f"Question {number}?", f" {number * 7}")
        assert TOKENIZER.decode(prompt.input_ids) == f"<s>Question {number}?"
        answered = (example.labels != IGNORE_INDEX).argmax()
        assert prompt.input_ids == example.input_ids[:answered].tolist()
    assert (
        encode_prompt("Question 3?", Data(source="-", format="prompt-completion"), TOKENIZER)
        == TOKENIZER("Question 3?")["input_ids"]
    )


def test_a_plain_text_is_continued_from_its_beginning(tmp_path: Path) -> None:
    story = "Once upon a time there was a cat. " * 4
    file = write(tmp_path / "a.jsonl", [{"text": story}, {"text": "a"}])
    dataset = load(file, format="completion", held_out=str(file), max_length=512)
    assert [prompt.text + prompt.reference for prompt in dataset.prompts] == [story, "a"]
    assert dataset.prompts[0].text == "Once upon a time there was a cat."
    assert (dataset.train[0].labels[1:] == dataset.train[0].input_ids[1:]).all()


# A prompt with a template is a conversation; without a template it stays raw, even if the tokenizer has one
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("format", "template", "chat_template", "row", "expected"),
    [
        ("prompt-completion", None, CHAT, {"prompt": "a", "completion": "b"}, "<s>ab</s>"),
        (
            "prompt-completion",
            "plain",
            None,
            {"prompt": "a", "completion": "b"},
            "<s>Question: a\nAnswer: b</s>",
        ),
        ("alpaca", None, CHAT, {"instruction": "a", "output": "b"}, "<user>a</s><assistant>b</s>"),
        ("alpaca", "plain", CHAT, {"instruction": "a", "output": "b"}, "<s>Question: a\nAnswer: b</s>"),
        ("completion", None, CHAT, {"text": "a"}, "<s>a</s>"),
        ("text", None, CHAT, {"text": "a"}, "<s>a</s>"),
    ],
)
def test_each_format_has_its_default_template(
    tmp_path: Path,
    format: str,
    template: str | None,
    chat_template: str | None,
    row: dict[str, str],
    expected: str,
) -> None:
    tokenizer = byte_level(bos=True, chat_template=chat_template)
    file = write(tmp_path / "a.jsonl", [row])
    dataset = load(file, tokenizer=tokenizer, format=format, template=template)
    assert tokenizer.decode(dataset.train[0].input_ids) == expected


def test_alpaca_rows_have_the_alpaca_prompt_without_a_template(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "2+2", "output": "4"}])
    (example,) = load(file, format="alpaca", max_length=512).train
    assert "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n4</s>" in TOKENIZER.decode(
        example.input_ids
    )
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    with pytest.raises(DataError, match="has no chat template"):
        load(write(tmp_path / "b.jsonl", [{"messages": messages}]), format="messages")


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=15),
    max_length=st.integers(8, 48),
)
@settings(deadline=None, max_examples=40)
def test_truncation_never_leaves_a_row_without_a_supervised_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], max_length: int
) -> None:
    rows = [{"prompt": "! " * p, "completion": "?!" * c} for p, c in lengths]
    file = write(tmp_path_factory.getbasetemp() / "long.jsonl", [*rows, {"prompt": "a", "completion": "b"}])
    whole = load(file, max_length=4096).train
    dataset = load(file, max_length=max_length, too_long="truncate")
    for example in dataset.train:
        full = whole[int(example.origin.rpartition(":")[2]) - 1]
        assert len(example.input_ids) == min(max_length, len(full.input_ids))
        assert (example.labels != IGNORE_INDEX).any()
        assert (example.labels == full.labels[:max_length]).all()
    fits = [int((example.labels != IGNORE_INDEX).argmax()) < max_length for example in whole]
    assert dataset.counts.train == sum(fits)
    assert dataset.counts.unsupervised == len(fits) - sum(fits)
    assert dataset.counts.truncated == sum(len(example.input_ids) > max_length for example in whole)


def test_too_long_rows_are_dropped_or_an_error_as_the_recipe_says(tmp_path: Path) -> None:
    rows = pairs(12)
    for number in (3, 7):
        rows[number]["completion"] = "the cat " * 100
    file = write(tmp_path / "a.jsonl", rows)
    dropped = load(file, too_long="drop")
    assert (dropped.counts.dropped, dropped.counts.train, dropped.counts.truncated) == (2, 10, 0)
    assert {4, 8}.isdisjoint(origins(dropped.train))
    cut = load(file, too_long="truncate")
    assert (cut.counts.dropped, cut.counts.train, cut.counts.truncated) == (0, 12, 2)
    assert cut.train[3].input_ids[-1] != TOKENIZER.eos_token_id
    with pytest.raises(
        DataError, match=r"2 of 12 rows have more than 64 tokens\n.*a\.jsonl:4: \d+ tokens"
    ) as raised:
        load(file, too_long="error")
    longest = int(str(raised.value).rpartition("max_length=")[2].split()[0])
    assert load(file, too_long="error", max_length=longest).counts.train == 12
    with pytest.raises(DataError):
        load(file, too_long="error", max_length=longest - 1)


def test_every_row_trains_eos_even_if_it_is_the_padding(hundred: Path) -> None:
    for tokenizer in (TOKENIZER, byte_level(pad="</s>"), sentencepiece(pad="</s>")):
        for packing in (False, True):
            dataset = load(hundred, tokenizer=tokenizer)
            assert dataset.pad_id == tokenizer.eos_token_id
            batches = Batches(
                dataset.train, micro_batch_size=4, global_batch_size=8, max_length=64, packing=packing,
                pad_id=dataset.pad_id, seed=0,
            )  # fmt: skip
            taught = sum(int((batch.labels == dataset.pad_id).sum()) for batch in batches.evaluation())
            assert taught == len(dataset.train)


LONG = [{"prompt": "a question much longer than that", "completion": "b"}] * 3


def test_counts_add_up(hundred: Path) -> None:
    counts = load(hundred, held_out=10, packing=True, max_length=128).counts
    assert counts.read == 100 == counts.train + counts.held_out
    dataset = load(hundred, held_out=10)
    assert counts.tokens == sum(len(example.input_ids) for example in dataset.train)
    assert counts.supervised == sum(int((example.labels != IGNORE_INDEX).sum()) for example in dataset.train)
    assert counts.packing_efficiency is not None
    assert 0.9 < counts.packing_efficiency <= 1
    assert dataset.counts.packing_efficiency is None


@pytest.mark.parametrize(
    ("rows", "section", "message"),
    [
        ([], {}, "the source has no rows"),
        (LONG, {"max_length": 8}, "none of 3 rows can be used: 3 longer than data.max_length"),
        (LONG, {"max_length": 8, "too_long": "truncate"}, "none of 3 rows .*: 3 without a trained token"),
        (["{"] * 3, {"on_bad_row": "skip"}, "none of 3 rows can be used: 3 bad"),
        (
            pairs(3),
            {"held_out": 3},
            r"data.held_out: cannot hold out 3 rows, because \S*a.jsonl has only 3 usable rows",
        ),
        (pairs(3), {"columns": {"promt": "a"}}, "no field 'promt'"),
        (pairs(3), {"template": "nothing"}, "is not a template; set it to alpaca"),
    ],
)
def test_data_without_trained_tokens_are_an_error_with_a_reason(
    tmp_path: Path, rows: list[Any], section: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", rows), **section)


def test_a_control_token_that_cannot_be_written_as_text_makes_a_bad_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "hello world"}, {"text": "hello </s> world"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: control token in text"):
        load(file, tokenizer=words(), format="completion")
    dataset = load(file, tokenizer=words(), format="completion", on_bad_row="skip")
    assert (dataset.counts.train, dataset.counts.reasons) == (1, {"control token in text": 1})


def test_one_row_is_trained_on_and_none_held_out(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "a.jsonl", pairs(1)), held_out=0.5)
    assert (len(dataset.train), len(dataset.held_out), dataset.prompts) == (1, 0, [])


def test_fewer_rows_than_a_global_batch_make_one_smaller_step(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "a.jsonl", pairs(3)))
    batches = Batches(
        dataset.train,
        micro_batch_size=2,
        global_batch_size=16,
        max_length=64,
        packing=False,
        pad_id=0,
        seed=0,
    )
    assert batches.steps_per_epoch == 1
    assert [batch.input_ids.shape[0] for batch in batches.step(0)] == [2, 1]


def test_the_error_for_a_wrong_column_lists_the_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}] * 3)
    with pytest.raises(DataError, match=r"the row has 'question', 'answer'") as raised:
        load(file)
    assert "3 of 3 rows cannot be used: 3 missing field" in str(raised.value)
    assert "data.columns" in str(raised.value)
    assert load(file, columns={"prompt": "question", "completion": "answer"}).counts.train == 3


GOOD = "good"
MISTAKES: dict[str, tuple[int, str, Callable[[int], Any]]] = {
    # kind of row: (number per 1000 rows, expected fate, function from its number to the row)
    "good": (700, GOOD, lambda n: {"prompt": f"Question {n}?", "completion": f" {n}"}),
    "broken JSON": (50, "broken JSON", lambda n: json.dumps(pairs(1)[0])[: n % 40 + 1]),
    "no object": (30, "not an object", lambda n: [f"[{n}]", f'"{n}"', "null", f"{n}"][n % 4]),
    "missing field": (40, "missing field", lambda n: [{"prompt": "a"}, {"completion": "a"}, {}][n % 3]),
    "wrong type": (40, "wrong type", lambda n: {"prompt": "a", "completion": [n, [n], {}, True][n % 4]}),
    "empty answer": (20, "empty answer", lambda n: {"prompt": "a", "completion": " " * (n % 3)}),
    "empty prompt": (15, "empty prompt", lambda n: {"prompt": "\n" * (n % 3), "completion": "a"}),
    "too long": (25, "truncated", lambda n: {"prompt": "a", "completion": f"{n} " * 99}),
    "all masked": (15, "unsupervised", lambda n: {"prompt": f"{n} " * 99, "completion": "a"}),
    "half a character": (10, "broken Unicode", lambda n: '{"prompt": "a", "completion": "\\ud83d"}'),
    "NUL": (8, "NUL character", lambda n: {"prompt": "a\0", "completion": f"{n}"}),
    "control": (2, GOOD, lambda n: {"prompt": "\x1b[31m\x07", "completion": f"\x0b{n}"}),
    "control token": (10, GOOD, lambda n: {"prompt": "what is </s>?", "completion": f"<s>{n}<|im_end|>"}),
    "duplicate key": (10, "duplicate key", lambda n: f'{{"prompt": "", "prompt": "", "completion": "{n}"}}'),
    "large": (5, "truncated", lambda n: {"prompt": f"{n}", "completion": "abc " * 5000}),
    "no number": (10, "not a number", lambda n: f'{{"prompt": "a", "completion": "{n}", "score": NaN}}'),
    "huge number": (10, "broken JSON", lambda n: f'{{"prompt": "a", "completion": {"9" * 5000}}}'),
}  # fmt: skip


def mistaken_rows(count: int) -> Iterator[tuple[str, Any]]:
    """Yield `count` rows as (expected fate, row) in random order."""
    kinds = [kind for kind, (share, _, _) in MISTAKES.items() for _ in range(share * count // 1000)]
    random.Random(0).shuffle(kinds)
    for number, kind in enumerate(kinds):
        _, fate, make = MISTAKES[kind]
        yield fate, make(number)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[Any]]:
    fates, rows = zip(*mistaken_rows(10_000), strict=True)
    return write(tmp_path_factory.mktemp("data") / "mistakes.jsonl", list(rows)), list(fates), list(rows)


def test_bad_rows_are_all_counted_and_the_first_ten_reasons_shown(
    mistaken: tuple[Path, list[str], list[Any]],
) -> None:
    file, fates, _ = mistaken
    bad = [
        (line, fate) for line, fate in enumerate(fates, 1) if fate not in (GOOD, "truncated", "unsupervised")
    ]
    with pytest.raises(DataError) as raised:
        load(file)
    first, *shown = str(raised.value).splitlines()
    assert first.startswith(f"{file}: {len(bad)} of 10000 rows cannot be used: ")
    totals = Counter(fate for _, fate in bad)
    assert all(f"{count} {kind}" in first for kind, count in totals.items())
    fate_of = dict(bad)
    places, kinds, reasons = zip(*(line.strip().split(": ", 2) for line in shown[:10]), strict=True)
    found = [int(place.removeprefix(f"{file}:")) for place in places]
    assert found == sorted(found)
    assert found[0] == bad[0][0]
    assert [fate_of[line] for line in found] == list(kinds)
    same = [
        re.search(rf" \(the same in (\d+) more rows?, next {file}:(\d+)\)$", reason) for reason in reasons
    ]
    assert any(same)
    assert all(fate_of[int(match[2])] == kind for match, kind in zip(same, kinds, strict=True) if match)
    listed = 10 + sum(int(match[1]) for match in same if match)
    assert shown[10].strip() == f"... and {len(bad) - listed} more rows with other reasons"
    assert raised.value.exit_code == 3


def test_skipping_keeps_exactly_the_rows_of_a_clean_file(
    mistaken: tuple[Path, list[str], list[Any]], tmp_path: Path
) -> None:
    file, fates, rows = mistaken
    kept = [row for fate, row in zip(fates, rows, strict=True) if fate in (GOOD, "truncated")]
    dataset = load(file, on_bad_row="skip", too_long="truncate")
    clean = load(write(tmp_path / "clean.jsonl", kept), too_long="truncate")
    assert len(dataset.train) == len(kept)
    for ours, reference in zip(dataset.train, clean.train, strict=True):
        assert np.array_equal(ours.input_ids, reference.input_ids)
        assert np.array_equal(ours.labels, reference.labels)
    assert dataset.fingerprint == clean.fingerprint
    counts = dataset.counts
    assert counts.read == 10_000 == counts.train + counts.bad + counts.unsupervised
    expected = Counter(fates)
    assert counts.truncated - counts.unsupervised == expected["truncated"]
    assert counts.unsupervised == expected["unsupervised"]
    assert counts.reasons == {kind: expected[kind] for kind in counts.reasons}
    assert counts.tallies["spelled controls: </s>"] == 100
