"""Tells a local source of rows from the id of a data set on the hub, by its name alone."""

import re

FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
"""suffixes of data files"""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""suffixes that can follow that of a data file; Parquet is compressed inside"""

STANDARD_INPUT = ("-", "/dev/stdin")
"""names of the rows that are piped into the command"""

_suffixes = "|".join(suffix[1:] for suffix in FILE_TYPES)
_compressions = "|".join(suffix[1:] for suffix in COMPRESSIONS)
DATA_FILE = re.compile(rf".*\.({_suffixes})(\.({_compressions}))?", re.DOTALL | re.IGNORECASE)
_LOCAL = re.compile(
    rf"{DATA_FILE.pattern}|bundled/.*|-|file://.*|[./~].*|.*/|.*[*?\[].*", re.DOTALL | re.IGNORECASE
)


def is_local(source: str) -> bool:
    """Return True if a source cannot be a data set on the hub: a file, a folder, a pattern or a pipe.

    A folder needs a path such as ./rows or rows/, because `owner/name` is also the form of a hub id.
    """
    return _LOCAL.fullmatch(source) is not None
