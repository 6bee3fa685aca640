"""Tokenised data in the cache: a reused entry equals what tokenising gives, and a stale entry is never used."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, sentencepiece

import qlora.data.cache
from qlora.data import Dataset, load_dataset
from qlora.data.dataset import make_dataset
from qlora.errors import DataError
from qlora.recipe import Data
from qlora.storage import cache

TOKENIZERS = {"bytes": byte_level(bos=True, pad="</s>"), "pieces": sentencepiece()}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write forty rows, among them a broken, a long, a control-token and a non-Latin one."""
    rows: list[Any] = [{"prompt": f"Question {n}?", "completion": f" {n * 7}"} for n in range(36)]
    odd = [
        "{broken",
        {"prompt": "long " * 40, "completion": " yes " * 40},
        {"prompt": "What is </s>?", "completion": " a token"},
        {"prompt": "Où est 猫?", "completion": " là 🐈"},
    ]
    return write(tmp_path_factory.mktemp("données") / "rows.jsonl", [*odd, *rows])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record one line each time that data are tokenised."""
    log: list[str] = []

    def logged(section: Data, *rest: Any) -> Dataset:
        log.append(section.source)
        return make_dataset(section, *rest)

    monkeypatch.setattr(qlora.data.cache, "make_dataset", logged)
    return log


def section(source: Path, **keys: Any) -> Data:
    defaults = {"format": "prompt-completion", "max_length": 64, "on_bad_row": "skip", "held_out": 4}
    return Data(source=str(source), **{**defaults, **keys})


def plain(dataset: Dataset) -> Any:
    """Return a data set as plain values, with their types."""
    examples = [
        [(row.input_ids.tolist(), row.labels.tolist(), row.origin) for row in part]
        for part in (dataset.train, dataset.held_out)
    ]
    return replace(dataset, train=examples[0], held_out=examples[1])  # type: ignore[arg-type]


@given(
    st.fixed_dictionaries(
        {
            "held_out": st.one_of(st.integers(0, 20), st.floats(0.01, 0.9), st.just("itself")),
            "max_length": st.sampled_from([8, 16, 64]),
            "too_long": st.sampled_from(["drop", "truncate"]),
            "packing": st.booleans(),
            "train_on": st.sampled_from(["completion", "all"]),
            "template": st.sampled_from([None, "plain", "chatml"]),
            "limit": st.sampled_from([None, 30]),
        }
    ),
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_cached_data_equal_the_tokenised_data(
    rows: Path, made: list[str], keys: dict[str, Any], tokenizer: str, seed: int
) -> None:
    if keys["held_out"] == "itself":
        keys["held_out"] = str(rows)
    arguments = (section(rows, **keys), TOKENIZERS[tokenizer], seed)
    try:
        expected = make_dataset(*arguments)
    except DataError:  # no row fits into 8 tokens with this template
        with pytest.raises(DataError):
            load_dataset(*arguments)
        return
    load_dataset(*arguments)
    made.clear()
    found = load_dataset(*arguments)
    assert made == [], "the cached data were not used"
    assert plain(found) == plain(expected)
    for ours, theirs in zip(
        (*found.train, *found.held_out), (*expected.train, *expected.held_out), strict=True
    ):
        assert (ours.input_ids.dtype, ours.labels.dtype) == (theirs.input_ids.dtype, theirs.labels.dtype)
        assert ours.input_ids.dtype == np.int32


def test_many_starts_tokenise_once(rows: Path, made: list[str]) -> None:
    for _ in range(3):
        load_dataset(section(rows), TOKENIZERS["bytes"], 0)
    assert len(made) == 1
    assert [entry.about for entry in cache.entries()] == [
        f"{rows} as prompt-completion, {type(TOKENIZERS['bytes']).__name__} of {len(TOKENIZERS['bytes'])} tokens"
    ]


CHANGES: dict[str, Callable[[Path], tuple[Data, Any, int]]] = {
    "a setting": lambda file: (section(file, max_length=32), byte_level(), 0),
    "the seed of the split": lambda file: (section(file), byte_level(), 1),
    "the tokenizer": lambda file: (section(file), byte_level(bos=True), 0),
    "its template": lambda file: (section(file), byte_level(chat_template="{{ messages }}"), 0),
    "its special tokens": lambda file: (section(file), byte_level(pad="</s>"), 0),
    "the file": lambda file: (
        section(write(file, [{"prompt": "a", "completion": "c"}] * 9)),
        byte_level(),
        0,
    ),
    "its name, which origins show": lambda file: (
        section(file.rename(file.parent / "b.jsonl")),
        byte_level(),
        0,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_tokenised_again(tmp_path: Path, made: list[str], change: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 9)
    load_dataset(section(file), byte_level(), 0)
    load_dataset(section(file), byte_level(), 0)
    assert len(made) == 1
    changed = CHANGES[change](file)
    assert plain(load_dataset(*changed)) == plain(make_dataset(*changed))
    assert len(made) == 2


@pytest.mark.parametrize("changed", ["code_version", "version"])
def test_other_code_or_libraries_tokenise_again(
    rows: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    load_dataset(section(rows), TOKENIZERS["bytes"], 0)
    monkeypatch.setattr(cache, changed, lambda *_, **__: "another")
    load_dataset(section(rows), TOKENIZERS["bytes"], 0)
    assert len(made) == 2


def test_the_key_names_the_code_that_parses_and_encodes(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code: list[str] = []
    monkeypatch.setattr(cache, "code_version", lambda *names, **_: code.extend(names))
    load_dataset(section(rows), TOKENIZERS["bytes"], 0)
    assert set(code) == {"formats", "data"}


@pytest.mark.parametrize("held_out", [0, "second"])
def test_without_a_split_the_seed_changes_nothing(
    tmp_path: Path, rows: Path, made: list[str], held_out: int | str
) -> None:
    second = write(tmp_path / "second.jsonl", [{"prompt": "a", "completion": "b"}])
    chosen = section(rows, held_out=str(second) if held_out == "second" else held_out)
    load_dataset(chosen, TOKENIZERS["bytes"], 0)
    load_dataset(chosen, TOKENIZERS["bytes"], 1)
    assert len(made) == 1
    if held_out == "second":
        write(second, [{"prompt": "a", "completion": "c"}])
        load_dataset(chosen, TOKENIZERS["bytes"], 1)
        assert len(made) == 2


def test_a_template_file_is_identified_by_its_content(tmp_path: Path, rows: Path, made: list[str]) -> None:
    template = tmp_path / "my.jinja"
    for text in ("{{ message.content }}", "{{ message.content }} ", "{{ message.content }}"):
        template.write_text(f"{{% for message in messages %}}{text}{{% endfor %}}")
        load_dataset(section(rows, template=str(template)), TOKENIZERS["bytes"], 0)
    assert len(made) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 9)

    def appended(*arguments: Any) -> Dataset:
        dataset = make_dataset(*arguments)
        write(file, [{"prompt": "a", "completion": "c"}] * 9)
        return dataset

    monkeypatch.setattr(qlora.data.cache, "make_dataset", appended)
    load_dataset(section(file), byte_level(), 0)
    assert cache.entries() == []


@pytest.mark.parametrize("name", ["train.tokens", "held_out.trained", "train.npz", "rest.json"])
def test_damaged_data_are_made_again(rows: Path, made: list[str], name: str) -> None:
    expected = load_dataset(section(rows), TOKENIZERS["bytes"], 0)
    (entry,) = cache.entries()
    content = bytearray((entry.path / name).read_bytes())
    content[-3] ^= 4
    (entry.path / name).write_bytes(content)
    assert plain(load_dataset(section(rows), TOKENIZERS["bytes"], 0)) == plain(expected)
    assert len(made) == 2
    load_dataset(section(rows), TOKENIZERS["bytes"], 0)
    assert len(made) == 2


def test_mistakes_are_reported_as_without_a_cache(tmp_path: Path, rows: Path) -> None:
    for broken in (
        section(tmp_path / "missing.jsonl"),
        section(tmp_path),
        section(rows, on_bad_row="error"),
        section(rows, template="nonesuch"),
        section(rows, template=str(tmp_path / "missing.jinja")),
        section(rows, held_out=str(tmp_path / "missing.jsonl")),
    ):
        with pytest.raises(DataError) as expected:
            make_dataset(broken, TOKENIZERS["bytes"], 0)
        with pytest.raises(DataError) as found:
            load_dataset(broken, TOKENIZERS["bytes"], 0)
        assert str(found.value) == str(expected.value)
    assert cache.entries() == []


def test_hub_data_are_identified_by_their_fingerprint(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    folder, load = tmp_path / "set", datasets.load_dataset
    folder.mkdir()
    monkeypatch.setattr(  # loads a folder in place of an id
        datasets, "load_dataset", lambda name, *rest, **keys: load(str(folder), *rest, **keys)
    )
    chosen = Data(source="some/set", format="prompt-completion", held_out=0)
    for rows in (4, 5):
        write(folder / "train.jsonl", [{"prompt": "a", "completion": "b"}] * rows)
        for _ in range(2):
            dataset = load_dataset(chosen, TOKENIZERS["bytes"], 0)
            assert dataset.train[0].origin == "some/set[train]:row 1"
            assert len(dataset.train) == rows
    assert len(made) == 2
