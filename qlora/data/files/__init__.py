"""Data files by type: each type is a reader of rows, chosen by the suffix of the file's name."""

from collections.abc import Callable, Iterator
from pathlib import Path

from qlora.data.files import csv_rows, json_rows, parquet_rows, text_rows
from qlora.data.files.record import Record

__all__ = ["READERS", "Record"]

READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".json": json_rows.read,
    ".jsonl": json_rows.read,
    ".ndjson": json_rows.read,
    ".csv": csv_rows.read,
    ".tsv": csv_rows.read,
    ".parquet": parquet_rows.read,
    ".txt": text_rows.read,
}
"""(path, its name in messages) -> rows, by the suffixes of `qlora.recipe.source_names.FILE_TYPES`"""
