"""Reads rows from Parquet files."""

from collections.abc import Iterator
from pathlib import Path

from qlora.data.files.record import Record
from qlora.errors import DataError
from qlora.storage import regular_file

_ROWS = 256
"""rows converted at a time"""


def count(path: Path) -> int | None:
    """Return the number of rows; None if the file cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        regular_file.check(path)
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError):
        return None


def read(path: Path, name: str) -> Iterator[Record]:
    """Read the rows of a Parquet file, numbered from 1.

    Raises:
        DataError: The file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{name}:row {number}", row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: no UTF-8
        raise DataError(
            f"{name}: cannot be read as Parquet: {error}. Write or download the file again"
        ) from error
