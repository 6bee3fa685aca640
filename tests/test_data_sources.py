"""Reading of every kind of data file, and the errors for files that cannot be read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers_for_tests import byte_level

from qlora.data import load_dataset, pipe
from qlora.data.files import READERS, json_rows, opened
from qlora.data.sources import identity, read
from qlora.errors import DataError
from qlora.formats import BadRow
from qlora.recipe import Recipe
from qlora.recipe.source_names import FILE_TYPES

ROWS = [{"text": "one"}, {"text": "zwei\nZeilen, 'ä' 😀"}, {"text": 'drei "quoted", done'}]

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


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
    """Write ROWS in the file format and with the compression that the name asks for."""
    if file.suffix in COMPRESS:
        plain = write_rows(file.with_suffix(""))
        file.write_bytes(COMPRESS[file.suffix](plain.read_bytes()))
        plain.unlink()
        return file
    suffix = file.suffix[1:]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        return file
    with file.open("w", encoding="utf-8", newline="") as stream:
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
        ("a.jsonl.bz2", [":1", ":2", ":3"]),
        ("a.json.xz", [":2", ":5", ":8"]),
        ("a.json.zst", [":2", ":5", ":8"]),
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


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_compression_is_detected_by_content_under_any_name(
    tmp_path: Path, name: str, compression: str
) -> None:
    file = write_rows(tmp_path / name)
    content = COMPRESS[compression](file.read_bytes())
    write(file, content)
    assert rows(file) == ROWS
    write(file, content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=r"is damaged \(.*; download it again"):
        rows(file)


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


def test_deep_nesting_is_named_also_in_a_line_longer_than_the_head(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": ' + "[" * 100_000 + "\n" + '{"a": 1}')
    assert reasons(file) == ["broken JSON: nested too deeply"]
    with pytest.raises(DataError, match=r"a\.json:1: broken JSON: nested too deeply"):
        rows(write(tmp_path / "a.json", "[" * 100_000 + "]" * 100_000))


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
    assert reasons(file) == [
        "broken CSV: a quote that is opened here is not closed, so all lines after it are lost"
    ]
    assert origins(file) == [":2", ":3"]


def test_csv_fields_may_be_a_megabyte(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", "text\n" + "x" * 2**20)) == [{"text": "x" * 2**20}]


@pytest.mark.parametrize(
    ("header", "reason"),
    [('"p"x,q', "',' expected after"), ('"p,q', "a quote that is opened here is not closed")],
)
def test_a_broken_quote_in_the_names_of_csv_columns_is_an_error(
    tmp_path: Path, header: str, reason: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.csv:1: broken CSV in the names of the columns: {reason}"):
        rows(write(tmp_path / "a.csv", f"{header}\n1,2\n"))


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


def test_the_error_for_a_missing_file_lists_the_alternatives(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl.gz")
    with pytest.raises(DataError, match=r"No such file.*train\.jsonl\.gz"):
        rows(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=r"unsupported file type; use \.json,"):
        rows(write(tmp_path / "a.docx", "hello"))
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_utf_16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    file = write_rows(tmp_path / name)
    write(file, file.read_text().encode(encoding))
    with pytest.raises(DataError, match=r"the text is UTF-16; save the file as UTF-8"):
        rows(file)


def test_latin_1_is_named_with_its_line(tmp_path: Path) -> None:
    expected = r"0xE4 \(ä in Latin-1 or Windows-1252\); save the file as UTF-8"
    for name, text in {"a.jsonl": '{"a": 1}\n{"a": "ä"}', "a.csv": "a\nb\nä\n", "a.txt": "b\nä"}.items():
        file = write(tmp_path / name, text.encode("latin-1"))
        (record,) = [record for record in read(str(file)) if isinstance(record.row, BadRow)]
        assert record.origin == f"{file}:{3 if name == 'a.csv' else 2}"
        assert re.search(f"not UTF-8: .*{expected}", str(record.row))
    file = write(tmp_path / "a.json", '[{"a": 1},\n{"a": "ä"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=rf"a\.json:2: not UTF-8: byte \d+ is {expected}"):
        rows(file)


def test_joined_files_are_read_or_their_joints_named(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    assert rows(write(tmp_path / "a.jsonl", (bom + b'{"a": 1}\n') * 2)) == [{"a": 1}] * 2
    file = write(tmp_path / "a.csv", (bom + b"a,b\n1,2\n") * 2)
    assert [str(row) for row in rows(file)][1] == (
        "repeated header: the file is several files joined; delete this line"
    )
    with pytest.raises(DataError, match=r"a\.json:2: a second list begins here"):
        rows(write(tmp_path / "a.json", '[{"a": 1}]\n[{"a": 2}]'))


def test_an_object_of_several_lines_names_the_way_to_its_rows(tmp_path: Path) -> None:
    whole = {"version": 1, "data": ROWS}
    with pytest.raises(DataError, match=r"a list under its key 'data'.*`jq '\.data' a\.json > rows\.json`"):
        rows(write(tmp_path / "a.json", json.dumps(whole, indent=1)))
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for text in (json.dumps(chat, indent=1), json.dumps(ROWS[0], indent=1) * 3, '{"a": 1,\n"b": 2}'):
        with pytest.raises(DataError, match=r"an object spans several lines. Write each row on one line"):
            rows(write(tmp_path / "a.json", text))
    # a cut first row is one bad row
    assert rows(write(tmp_path / "a.jsonl", '{"a": 1,\n{"a": 2}'))[1:] == [{"a": 2}]


def test_other_column_separators_are_named(tmp_path: Path) -> None:
    for name, text, expected in [
        ("a.csv", "a;b\n1;2\n", "separated by semicolons, not by commas: a;b; save it with commas"),
        ("a.csv", "a\tb\n1\t2\n", "separated by tabs, not by commas: a\tb; name the file .tsv"),
        ("a.tsv", "a,b\n1,2\n", "separated by commas, not by tabs: a,b; name the file .csv"),
    ]:
        with pytest.raises(DataError, match=re.escape(expected)):
            rows(write(tmp_path / name, text))


@pytest.mark.parametrize("size", [1, 7, 2**18])
def test_a_list_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", size)
    odd: list[Any] = [
        *ROWS,
        {"a": "\\u00e9\\ud83d\\ude00 \\\\" * 9, "b": [1.5e3, None, True, {"c": []}]},
        12,
        {"d": ROWS},
    ]
    for indent in (None, 1):
        text = json.dumps(odd, indent=indent, ensure_ascii=indent is None)
        file = write(tmp_path / "a.json", text)
        read_rows = rows(file)
        assert [str(row) if isinstance(row, BadRow) else row for row in read_rows] == [
            "not an object: a row must have the form {...}" if row == 12 else row for row in odd
        ]
        lines_of_rows = [
            number for number, line in enumerate(text.splitlines(), 1) if re.match(r"\[?( \{| 12)", line)
        ]
        if indent:
            assert origins(file) == [f":{number}" for number in lines_of_rows]
        for cut in range(1, len(text) - 1, 97):
            with pytest.raises(DataError, match="broken JSON"):
                rows(write(tmp_path / "cut.json", text[:cut]))


def test_a_limit_reads_only_the_beginning_of_a_list(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", "[" + '{"a": "é"},' * 200_000 + "broken")
    assert rows(file, limit=3) == [{"a": "é"}] * 3


def test_a_row_without_end_is_an_error_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (opened, json_rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 2**20)
    for name, text in {"a.jsonl": '{"a": "', "a.json": '[{"a": "'}.items():
        file = write(tmp_path / f"{name}.bz2", bz2.compress((text + "a" * 2**25).encode()))
        with pytest.raises(DataError, match=rf"{name}\.bz2:1: a row of more than"):
            rows(file)


def test_the_documents_of_a_text_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\nA title\n\nfirst line\r\nsecond line\n \n\nend\n\n")
    assert rows(file) == [{"text": "A title"}, {"text": "first line\nsecond line"}, {"text": "end"}]
    assert origins(file) == [":2", ":4", ":8"]
    file = write(tmp_path / "lines.txt", "\n\none\ntwo\n\n")
    assert rows(file) == [{"text": "one"}, {"text": "two"}]
    assert rows(write(tmp_path / "empty.txt", "\n")) == []


def test_a_folder_and_a_pattern_give_the_rows_of_their_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json.gz"):
        write_rows(tmp_path / name)
    write(tmp_path / "README.txt", "not rows")
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "c.jsonl")
    with pytest.raises(DataError, match=r"files of several types \(\.json, \.jsonl\); name those to read"):
        rows(tmp_path)
    (tmp_path / "b.jsonl").rename(tmp_path / "b.json")
    assert rows(tmp_path) == ROWS * 2
    first, *_, last = [record.origin for record in read(f"{tmp_path}/")]
    assert (first, last) == (f"{tmp_path}/a.json.gz:2", f"{tmp_path}/b.json:3")
    assert rows(tmp_path / "*.json*", limit=4) == [*ROWS, ROWS[0]]
    assert rows(tmp_path / "**" / "*.jsonl") == ROWS
    with pytest.raises(DataError, match=r"no file has such a name. Data files in .*a\.json\.gz, b\.json"):
        rows(tmp_path / "*.csv")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match=r"is a folder without data files .*; its folders are x"):
        rows(tmp_path / "empty")


def test_a_folder_with_files_for_evaluation_is_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write_rows(tmp_path / name)
    with pytest.raises(DataError, match=r"files for evaluation \(test\.jsonl\); name the file"):
        rows(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert rows(tmp_path) == ROWS


def test_a_source_changes_its_identity_with_any_of_its_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name)
    identities = [identity(str(tmp_path)), identity(str(tmp_path / "*.jsonl"))]
    assert identities[0] == identities[1]
    write(tmp_path / "b.jsonl", "{}")
    assert identity(str(tmp_path)) not in (None, identities[0])
    assert identity(str(tmp_path / "*.csv")) is None


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        (
            "https://example.org/rows.jsonl?a=b",
            "`curl -L -o rows.jsonl 'https://example.org/rows.jsonl?a=b'`",
        ),
        ("s3://bucket/rows.jsonl", "download it first with `the tool of that storage`"),
        ("https://huggingface.co/datasets/a/b/blob/main/c.json", "give its id, a/b"),
        ("hf://datasets/a/b", "give its id, a/b"),
    ],
)
def test_a_url_of_another_machine_is_refused_with_advice(url: str, advice: str) -> None:
    with pytest.raises(DataError, match=re.escape(advice)):
        rows(url)


def test_a_file_url_is_read(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a b.jsonl")
    assert rows(file.as_uri()) == ROWS
    with pytest.raises(DataError, match="No such file"):
        rows("file:///nothing.jsonl")


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_piped_rows_can_be_read_several_times(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pipe.spooled.cache_clear()
    pipe._temporary_file.cache_clear()
    content = gzip.compress("\n".join(map(json.dumps, ROWS)).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [record.origin for record in read(name)] == [f"/dev/stdin:{number}" for number in (1, 2, 3)]
    assert rows(name) == ROWS
    assert identity(name) is not None


def test_each_file_type_of_a_recipe_has_a_reader() -> None:
    assert tuple(READERS) == FILE_TYPES


def test_the_key_of_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    here = tmp_path / "rows.jsonl"
    here.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    for data, key in (
        ({"source": "gone.jsonl"}, "data.source"),
        ({"source": str(here), "held_out": "gone.jsonl"}, "data.held_out"),
        ({"sources": [{"source": str(here)}, {"source": "gone.jsonl"}]}, "data.sources[1].source"),
    ):
        made = Recipe.from_dict(
            {"base": {"model": "m"}, "data": {"held_out": 1, "format": "prompt-completion", **data}}
        )
        with pytest.raises(DataError) as raised:
            load_dataset(made.data, byte_level(), 0)
        assert str(raised.value).startswith(f"{key}: 'gone.jsonl': No such file")
