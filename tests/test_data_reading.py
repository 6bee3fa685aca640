"""Rows become examples in one pass: reasons in groups, other formats by name, split texts, rows in memory."""

import errno
import io
import json
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers_for_tests import byte_level

from qlora.data import IGNORE_INDEX, Dataset, Example, encode_prompt, load_dataset, remarks
from qlora.data import reading as reading_module
from qlora.data.examples import Examples, ExampleWriter
from qlora.data.files import parquet_rows
from qlora.data.layout import Layout
from qlora.errors import DataError, ModelError, SaveError
from qlora.formats import Completion
from qlora.recipe import Data

TOKENIZER = byte_level(bos=True, pad="</s>")
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def load(source: Path | str, **section: Any) -> Dataset:
    given = {key: section.pop(key) for key in ("rows", "progress") if key in section}
    arguments = {"format": "prompt-completion", "max_length": 64, "held_out": 0, **section}
    return load_dataset(Data(source=str(source), **arguments), TOKENIZER, 0, **given)


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {number}?", "completion": f" {number * 7}"} for number in range(count)]


def test_rows_with_the_same_reason_are_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a"}] * 40 + pairs(2) + [{"prompt": "a", "completion": 1}])
    with pytest.raises(DataError) as raised:
        load(file)
    assert str(raised.value).splitlines() == [
        f"{file}: 41 of 43 rows cannot be used: 40 missing field, 1 wrong type",
        f"  {file}:1: missing field: 'completion' (the row has 'prompt') (the same in 39 more rows, next {file}:2)",
        f"  {file}:43: wrong type: 'completion' must be text, not a number",
        "If a field has another name in the data, set data.columns to {field: its column}.",
        "If the rows have another structure, choose another data.format.",
        "Correct the rows, or skip them with data.on_bad_row=skip",
    ]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (CHAT, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b", "text": "c"}, "alpaca"),
        ({"text": "c", "id": 3}, "completion"),
    ],
)
def test_rows_of_another_format_are_recognised(tmp_path: Path, row: Any, format: str) -> None:
    file = write(tmp_path / "a.jsonl", [row] * 12)
    with pytest.raises(
        DataError, match=rf"The row at .*a\.jsonl:1 looks like data\.format={format}; set that"
    ):
        load(file)


def test_rows_in_an_object_of_one_line_are_located(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [{"version": 1, "data": pairs(3)}])
    with pytest.raises(
        DataError, match=r"The rows seem to be a list under the key 'data'; save that list alone"
    ):
        load(file)


def test_the_reasons_are_given_even_if_bad_rows_are_skipped_and_nothing_is_left(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [CHAT] * 3)
    with pytest.raises(DataError) as raised:
        load(file, on_bad_row="skip")
    message = str(raised.value)
    assert "none of 3 rows can be used: 3 bad" in message
    assert f"{file}:1: missing field: 'prompt' (the row has 'messages')" in message
    assert "looks like data.format=messages" in message
    assert "data.on_bad_row=skip" not in message
    with pytest.raises(DataError, match=r"(?s)b\.jsonl:1: (\d+) tokens.*the longest row has \1 tokens"):
        load(
            write(tmp_path / "b.jsonl", [{"prompt": "a long question" * 9, "completion": "a"}]), max_length=8
        )


def test_a_long_text_is_split_so_that_each_token_is_trained_once(tmp_path: Path) -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000))
    file = write(tmp_path / "a.jsonl", [{"text": text}, {"text": "short"}])
    whole = load(file, format="text", max_length=2048).train[0]
    dataset = load(file, format="text", too_long="split")
    *pieces, short = dataset.train
    assert max(len(piece.input_ids) for piece in pieces) == 64
    assert TOKENIZER.decode(short.input_ids) == "<s>short</s>"
    trained = np.concatenate([piece.labels[piece.labels != IGNORE_INDEX] for piece in pieces])
    assert trained.tolist() == whole.input_ids[1:].tolist()
    for before, after in pairwise(pieces):
        assert after.input_ids[0] == before.input_ids[-1]
        assert after.labels[0] == IGNORE_INDEX
    counts = dataset.counts
    assert (counts.read, counts.train, counts.split, counts.dropped) == (
        2,
        len(pieces) + 1,
        len(pieces) - 1,
        0,
    )
    assert "split into several rows: 1 text longer than data.max_length" in remarks(counts)


@pytest.mark.parametrize("length", range(8, 30))
def test_no_piece_of_a_split_text_is_empty(tmp_path: Path, length: int) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "a" * length}])
    dataset = load(file, format="text", too_long="split", max_length=8)
    assert all((row.labels != IGNORE_INDEX).any() for row in dataset.train)
    assert dataset.counts.supervised == load(file, format="text").counts.supervised


def test_the_pieces_of_a_row_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"text": f"{number} " * 90} for number in range(100, 120)]
    dataset = load(write(tmp_path / "a.jsonl", rows), format="text", too_long="split", held_out=5)
    train, held_out = ({row.origin for row in part} for part in (dataset.train, dataset.held_out))
    assert (len(train), len(held_out)) == (15, 5)
    assert not train & held_out
    assert [prompt.origin for prompt in dataset.prompts] == list(dict.fromkeys(dataset.held_out.origins))


def test_rows_in_memory_are_read_as_those_of_a_file(tmp_path: Path) -> None:
    rows = pairs(30)
    from_file = load(write(tmp_path / "a.jsonl", rows), held_out=4)
    for given in (rows, iter(rows)):
        in_memory = load("my rows", rows=given, held_out=4)
        assert in_memory.fingerprint == from_file.fingerprint
        assert [prompt[:3] for prompt in in_memory.prompts] == [prompt[:3] for prompt in from_file.prompts]
        assert in_memory.train[0].origin == f"my rows:row {from_file.train[0].origin.rpartition(':')[2]}"
    assert load("my rows", rows=rows[:7]).counts.train == 7  # no cache returns the earlier rows
    with pytest.raises(DataError, match="my rows:row 2: missing field: 'completion'"):
        load("my rows", rows=[rows[0], {"prompt": "a"}])
    with pytest.raises(DataError, match="my rows:row 1: not an object"):
        load("my rows", rows=["text"])


def test_progress_counts_the_rows(tmp_path: Path) -> None:
    lines: list[str] = []
    file = write(tmp_path / "a.jsonl", pairs(3000))
    load(file, progress=lines.append)
    assert lines[0] == f"tokenizing {file}: 1,024 of 3,000 rows"
    assert lines[-1] == f"tokenizing {file}: 3,000 of 3,000 rows"
    load(file, progress=lines.append, limit=7)
    assert lines[-1] == f"tokenizing {file}: 7 of 7 rows"
    table = pyarrow.Table.from_pylist(pairs(5))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    load(tmp_path / "a.parquet", progress=lines.append)
    assert lines[-1] == f"tokenizing {tmp_path}/a.parquet: 5 of 5 rows"
    (tmp_path / "list.json").write_text(json.dumps(pairs(3)))
    load(tmp_path / "list.json", progress=lines.append)
    assert lines[-1] == f"tokenizing {tmp_path}/list.json: 3 rows"


def test_no_text_of_a_training_row_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a reference to nothing but the rows of a chunk, however many there are."""

    class Traced(Completion):
        __slots__ = ("__weakref__",)

    alive: weakref.WeakSet[Traced] = weakref.WeakSet()
    most = 0
    read = Layout.read

    def traced(self: Layout, row: Any) -> Any:
        nonlocal most
        content = read(self, row)
        content = Traced(content.prompt, content.completion)  # type: ignore[union-attr]
        alive.add(content)
        most = max(most, len(alive))
        return content

    monkeypatch.setattr(Layout, "read", traced)
    monkeypatch.setattr(reading_module, "_ROWS", 16)
    dataset = load(write(tmp_path / "a.jsonl", pairs(500)), held_out=3)
    assert (len(dataset.train), len(dataset.prompts)) == (497, 3)
    assert most <= 32


def test_a_chunk_is_limited_by_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "_CHARACTERS", 100)
    lines: list[str] = []
    load(
        write(tmp_path / "a.jsonl", [{"text": "a" * 60}] * 7),
        format="text",
        max_length=128,
        progress=lines.append,
    )
    assert [line.rpartition(": ")[2] for line in lines] == [f"{number} of 7 rows" for number in (2, 4, 6, 7)]


def examples(count: int) -> Iterator[Example]:
    generator = np.random.default_rng(count)
    for number in range(count):
        ids = generator.integers(1, 99, generator.integers(1, 9)).astype(np.int32)
        labels = np.where(generator.random(len(ids)) < 0.5, ids, np.int32(IGNORE_INDEX))
        yield Example(ids, labels, f"a:{number}")


def plain(examples: Any) -> list[Any]:
    return [(row.input_ids.tolist(), row.labels.tolist(), row.origin) for row in examples]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_examples_are_what_was_written(tmp_path: Path, count: int) -> None:
    rows = list(examples(count))
    with ExampleWriter() as writer:
        for row in rows:
            writer.append(*row)
        written = writer.examples()
    written.save(tmp_path, "part")
    loaded = Examples.load(tmp_path, "part", list(written.origins))
    chosen = written.select(range(0, count, 3))
    chosen.save(tmp_path, "chosen")
    for found, expected in [
        (written, rows),
        (loaded, rows),
        (Examples.of(rows), rows),
        (chosen, rows[::3]),
        (written[1:4], rows[1:4]),
        (Examples.load(tmp_path, "chosen", list(chosen.origins)), rows[::3]),
    ]:
        assert len(found) == len(expected)
        assert plain(found) == plain(expected)
        assert found.lengths.tolist() == [len(row.input_ids) for row in expected]
        assert found.supervised.tolist() == [int((row.labels[1:] != IGNORE_INDEX).sum()) for row in expected]
    with pytest.raises(ValueError, match="documents with"):
        Examples.load(tmp_path, "part", ["one more", *written.origins])


class FullDisk(io.BytesIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.data.examples._temporary_file", FullDisk)
    with pytest.raises(SaveError, match=r"cannot be written to .*No space left.*set QLORA_CACHE"):
        Examples.of(list(examples(1)))


def test_rows_marked_as_not_to_be_trained_are_left_out_and_counted(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages, "label": good} for good in (True, False, True, False)]
    rows.append({"messages": [messages[0], {**messages[1], "weight": 0}]})
    counts = load(write(tmp_path / "a.jsonl", rows), format="messages", template="plain").counts
    assert (counts.read, counts.marked, counts.train, counts.unsupervised, counts.bad) == (5, 3, 2, 0, 0)
    assert remarks(counts) == [
        "identical to an earlier training row, token for token: 1 row",
        "left out: 3 rows marked as not to be trained, label: false (2), every answer has weight 0 (1)",
    ]


def test_text_of_a_parquet_file_that_is_not_utf8_is_a_named_error(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["caf\u00e9" * 3, "a text"]})
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)
    whole = file.read_bytes()
    file.write_bytes(whole.replace("\u00e9".encode(), b"\xe9\xe9"))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet: 'utf-8' codec"):
        list(parquet_rows.read(file, str(file)))


def test_a_row_on_which_the_tokenizer_fails_is_a_bad_row(tmp_path: Path) -> None:
    """tokenizers panics when a regular expression takes too long, and a panic is no Exception."""
    tokenizer = byte_level()
    backend = tokenizer._tokenizer
    slow = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([slow, backend.pre_tokenizer])
    rows = [{"prompt": f"Question {number}?", "completion": " 7"} for number in range(4)]
    rows[2] = {"prompt": "a" * 60 + "b", "completion": " 7"}
    data = Data(source=str(write(tmp_path / "rows.jsonl", rows)), format="prompt-completion", held_out=0)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the tokenizer fails on its text: Onig: .*limit"):
        load_dataset(data, tokenizer, 0)
    kept = load_dataset(data.model_copy(update={"on_bad_row": "skip"}), tokenizer, 0)
    assert [example.origin[-1] for example in kept.train] == ["1", "2", "4"]
    with pytest.raises(ModelError, match="the tokenizer fails on this text"):
        encode_prompt("a" * 60 + "b", data, tokenizer)
