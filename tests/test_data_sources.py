"""Reading of every kind of data file, and the errors for files that cannot be read."""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora.data.sources import read
from qlora.errors import DataError
from qlora.formats import BadRow

ROWS = [{"text": "one"}, {"text": "zwei\nZeilen, 'ä' 😀"}, {"text": 'drei "quoted", done'}]


def rows(file: Path | str, **kwargs: Any) -> list[Any]:
    return [record.row for record in read(str(file), **kwargs)]


def origins(file: Path) -> list[str]:
    return [record.origin.removeprefix(str(file)) for record in read(str(file))]


def reasons(file: Path) -> list[str]:
    return [str(record.row) for record in read(str(file)) if isinstance(record.row, BadRow)]


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def write_rows(file: Path) -> Path:
    """Write ROWS in the file format that the name asks for."""
    suffix = file.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        return file
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt", encoding="utf-8", newline="") as stream:
        if suffix in ("csv", "tsv"):
            writer = csv.DictWriter(stream, ["text"], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
        elif suffix == "json":
            json.dump(ROWS, stream, indent=1)
        else:
            stream.write("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    return file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", [":1", ":2", ":3"]),
        ("a.ndjson.gz", [":1", ":2", ":3"]),
        ("a.json", [":2", ":5", ":8"]),
        ("a.json.gz", [":2", ":5", ":8"]),
        ("a.csv", [":2", ":3", ":5"]),  # the second row has two lines
        ("a.csv.gz", [":2", ":3", ":5"]),
        ("a.tsv", [":2", ":3", ":5"]),
        ("a.parquet", [":row 1", ":row 2", ":row 3"]),
    ],
)
def test_a_file_of_each_kind_gives_its_rows_and_lines(tmp_path: Path, name: str, expected: list[str]) -> None:
    file = write_rows(tmp_path / name)
    assert rows(file) == ROWS
    assert origins(file) == expected
    assert rows(file, limit=2) == ROWS[:2]


def test_json_lines_and_a_json_list_are_distinguished_by_content(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "lines.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows(write(tmp_path / "list.jsonl", '\n [{"a": 1},\n{"a": 2}]\n')) == [{"a": 1}, {"a": 2}]


def test_rows_that_share_a_line_are_distinguished_by_their_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '[{"a": 1}, {"a": 2},\n{"a": 3}, {"a": 4}]')
    assert origins(file) == [":1", ":1:12", ":2", ":2:11"]


def test_blank_lines_a_missing_last_break_and_windows_breaks_change_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '\r\n{"a": 1}\r\n\n  \n{"a": 2}')
    assert rows(file) == [{"a": 1}, {"a": 2}]
    assert origins(file) == [":2", ":5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / name)
    write(file, b"\xef\xbb\xbf" + file.read_bytes())
    assert rows(file) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_gzip_is_detected_by_content_under_any_name(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / name)
    write(file, gzip.compress(file.read_bytes()))
    assert rows(file) == ROWS


@pytest.mark.parametrize("content", ["", "\n\n", "[]", " [ ] \n"])
def test_a_file_without_rows_has_none(tmp_path: Path, content: str) -> None:
    assert rows(write(tmp_path / "a.json", content)) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "broken JSON: Expecting ',' delimiter at column 8"),
        (b"hello", "broken JSON: Expecting value at column 1"),
        (b'{"a": 1} {"b": 2}', "broken JSON: Extra data at column 10"),
        (b"[" * 100_000, "broken JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
        (b"[1, 2]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"a": NaN}', "not a number: NaN"),
        (b'{"a": [-Infinity]}', "not a number: -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate key: 'a'"),
        (b'{"a": {"b": 1, "b": 2}}', "duplicate key: 'b'"),
        (b'{"a": "\xe4"}', "not UTF-8: byte 8"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_read(tmp_path: Path, line: bytes, reason: str) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read(str(file))
    assert (first.row, last.row) == ({"a": 0}, {"a": 2})
    assert bad.origin == f"{file}:2"
    assert str(bad.row).startswith(reason)


def test_a_bad_row_of_a_list_is_named_and_the_next_one_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '[{"a": 0},\n{"a": 1, "a": {"b": NaN}},\n7,\n{"a": 2}]')
    assert [record.row for record in read(str(file)) if not isinstance(record.row, BadRow)] == [
        {"a": 0},
        {"a": 2},
    ]
    assert [str(record.origin)[-2:] for record in read(str(file)) if isinstance(record.row, BadRow)] == [
        ":2",
        ":3",
    ]
    assert reasons(file) == [
        "not a number: NaN is not valid JSON",
        "not an object: a row must have the form {...}",
    ]


@pytest.mark.parametrize("rest", ["{'b': 1}]", '{"b": 1} {"c": 2}]', '{"b": 1', '{"b": 1}', "", "[[["])
def test_a_broken_list_is_an_error_as_its_next_row_cannot_be_found(tmp_path: Path, rest: str) -> None:
    file = write(tmp_path / "a.json", '[{"a": 0},\n' + rest)
    with pytest.raises(DataError, match=r"a\.json:2: broken JSON"):
        rows(file)


def test_text_after_a_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text after the closing bracket"):
        rows(write(tmp_path / "a.json", '[{"a": 0}]\n{"a": 1}'))


def test_bad_csv_rows_are_named_by_the_line_they_begin_in(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'p,c\n"two\nlines",b\n\none\n"x"y,z\n1,2,3\nlast,"row"\n')
    records = list(read(str(file)))
    assert [(record.origin.rpartition(":")[2], str(record.row)) for record in records] == [
        ("2", "{'p': 'two\\nlines', 'c': 'b'}"),
        ("5", "wrong number of columns: 1, the header has 2"),
        ("6", "broken CSV: ',' expected after '\"'"),
        ("7", "wrong number of columns: 3, the header has 2"),
        ("8", "{'p': 'last', 'c': 'row'}"),
    ]


def test_an_open_quote_swallows_the_rest_and_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'p,c\na,b\n"open,c\nd,e\n')
    assert reasons(file) == ["broken CSV: unexpected end of data"]
    assert origins(file) == [":2", ":3"]


def test_csv_fields_may_be_a_megabyte(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", "text\n" + "x" * 2**20)) == [{"text": "x" * 2**20}]


def test_two_csv_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1: two columns have the same name: p, p"):
        rows(write(tmp_path / "a.csv", "p,p\na,b\n"))


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    zipped = gzip.compress(b'{"a": 1}\n' * 10_000)
    for name, content in {
        "cut.jsonl.gz": zipped[: len(zipped) // 2],
        "flipped.jsonl.gz": zipped[:-5] + bytes([zipped[-5] ^ 1]) + zipped[-4:],
        "garbage.jsonl.gz": b"\x1f\x8b" + os.urandom(100),
    }.items():
        with pytest.raises(DataError, match=r"the gzip file is damaged|cannot be read"):
            rows(write(tmp_path / name, content))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        rows(write(tmp_path / "a.parquet", b"PAR1 nonsense PAR1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 10"):
        rows(write(tmp_path / "latin.json", b'[{"a": "x\xe4"}]'))


def test_the_error_for_a_missing_file_lists_the_alternatives(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl.gz")
    with pytest.raises(DataError, match=r"No such file.*train\.jsonl\.gz"):
        rows(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=r"is a folder; give the path of one file.*train\.jsonl\.gz"):
        rows(tmp_path)
    with pytest.raises(DataError, match=r"unsupported file type; use \.json,"):
        rows(write(tmp_path / "a.txt", "hello"))
    with pytest.raises(DataError, match="No such file"):
        rows("no/such/folder/rows")
    with pytest.raises(DataError, match="No such file"):
        rows("owner/rows.csv.gz")
    with pytest.raises(DataError, match="null byte"):
        rows("a\0.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait forever
    with pytest.raises(DataError, match="not a regular file"):
        rows(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="No such file"):
        rows("bundled/nothing.jsonl")


def test_rows_of_the_package_itself() -> None:
    (first,) = rows("bundled/tickets/train.jsonl", limit=1)
    assert "messages" in first


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "openai/gsm8k/main", "squad"])
def test_the_error_for_a_hub_id_without_a_network_gives_advice(name: str) -> None:
    with pytest.raises(
        DataError,
        match=rf"(?s)'{name.removesuffix('/main')}' is not a local file.*copy a file of the data set to",
    ):
        rows(name)


def test_a_data_set_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from qlora.data.sources import _hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl")
    records = list(_hub(str(tmp_path / "set"), None, "train"))  # loads a folder in place of an id
    assert [record.row for record in records] == ROWS
    assert records[1].origin.endswith("set[train]:row 2")
    with pytest.raises(DataError, match="split 'test'"):
        list(_hub(str(tmp_path / "set"), None, "test"))
