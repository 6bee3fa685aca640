"""Reads rows, each with its file and line, from local files, a pipe, the package or the Hugging Face hub."""

import glob
import hashlib
import re
import stat
import textwrap
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from qlora.data.files import READERS, Record, json_rows, parquet_rows
from qlora.data.pipe import spooled
from qlora.errors import DataError
from qlora.recipe.source_names import COMPRESSIONS, FILE_TYPES, STANDARD_INPUT, is_local
from qlora.storage import regular_file

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(?:/[\w.-]+)?)(?:/(?P<configuration>[\w.-]+))?")
_HELD_OUT = re.compile(r"(^|[._-])(test|valid|validation|val|dev|eval)([._-]|$)")


class UnreadSource(DataError):
    """A source as a whole cannot be read.

    reason: what is wrong, without the key of the source.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.reason = reason


def read(source: str, split: str = "train", limit: int | None = None) -> Iterator[Record]:
    """Yield the first `limit` rows of a data set, in order.

    Args:
        source: a local JSON, JSONL, CSV, TSV, Parquet or text file, which can be compressed; a folder of such files
            or a pattern such as rows/*.jsonl, whose files are read in the order of their names; `-` for the standard
            input; `bundled/...`; or the id of a data set on the hub: `owner/name`, or `owner/name/configuration` if
            it has several configurations.
        split: split of a data set on the hub.
        limit: number of rows to read; None reads all.

    Raises:
        DataError: The source as a whole cannot be read. A single bad row becomes a Record with a BadRow.
    """
    hub = _hub_id(source)
    records = _hub(*hub, split) if hub else chain.from_iterable(_file(*file) for file in _files(source))
    return islice(records, limit)


def identity(source: str, split: str = "train") -> str | None:
    """Return an identifier of a data set's content: SHA-256 of its files, or the fingerprint from `datasets`.

    None if there is none or a file cannot be read; `read` reports the reason. Arguments as in `read`.
    """
    hub = _hub_id(source)
    if hub:
        return getattr(_hub_rows(*hub, split), "_fingerprint", None)
    try:
        digests = []
        for path, name in _files(source):
            with regular_file.opened(path) as file:
                digests.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
    except (OSError, ValueError, DataError):
        return None
    return digests[0][1] if len(digests) == 1 else hashlib.sha256(repr(digests).encode()).hexdigest()


def count(source: str, split: str = "train") -> int | None:
    """Return the number of rows if it is known without parsing them, for a display of progress. Arguments as in `read`.

    Known are the rows of the hub, of Parquet files and of JSON lines that are not compressed.
    """
    hub = _hub_id(source)
    if hub:
        return len(_hub_rows(*hub, split))
    counts = [_count_in_file(path) for path, _ in _files(source)]
    return None if None in counts else sum(filter(None, counts))


def _count_in_file(path: Path) -> int | None:
    if path.suffix == ".parquet":
        return parquet_rows.count(path)
    return json_rows.count_lines(path) if path.suffix in (".jsonl", ".ndjson") else None


def on_hub(source: str) -> bool:
    """Return True if a source is read from the hub, not from this machine."""
    return _hub_id(source) is not None


def _hub_id(source: str) -> tuple[str, str | None] | None:
    """Return the id and configuration of a data set on the hub; None if the source is local."""
    match = _HUB_ID.fullmatch(source)
    if match is None or is_local(source) or Path(source).exists():
        return None
    return match["name"], match["configuration"]


def _files(source: str) -> list[tuple[Path, str]]:
    """Return the files of a local source, each with its name in messages.

    Raises:
        DataError: The source is a URL of another machine, or it has no files or files that do not belong together.
    """
    if source in STANDARD_INPUT:
        return [(spooled(), STANDARD_INPUT[1])]
    if source.startswith("bundled/"):
        from qlora import bundled

        return [(bundled.path(source), source)]
    if re.match(r"\w+://", source):
        return [(_path_of_url(source), source)]
    path = Path(source).expanduser()
    try:
        folder, exists = path.is_dir(), path.exists()
    except ValueError as error:  # a NUL in the path
        raise UnreadSource(f"{source!r}: {error}") from None
    if folder:
        return [(file, str(file)) for file in _in_folder(path, source)]
    if exists or not glob.has_magic(source):
        return [(path, source)]
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = [Path(name) for name in found if Path(name).is_file()]
    if not files:
        raise UnreadSource(f"{source!r}: no file has such a name{_neighbours(path.parent)}")
    return [(file, str(file)) for file in files]


def _path_of_url(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    hub = re.match(r"(?:hf://|https?://huggingface\.co/)datasets/([\w.-]+/[\w.-]+)", url)
    if hub:
        raise UnreadSource(f"{url!r} is a data set on the hub; give its id, {hub[1]}")
    name = Path(unquote(parts.path)).name or "rows.jsonl"
    command = (
        f"curl -L -o {name} '{url}'" if parts.scheme in ("http", "https") else "the tool of that storage"
    )
    raise UnreadSource(
        f"{url!r} is not on this machine; download it first with `{command}` and give the file's path"
    )


def _in_folder(folder: Path, name: str) -> list[Path]:
    """Return the data files directly in a folder, by name.

    Raises:
        DataError: There are none, they are of several types, or some are for testing: reading all would then be wrong.
    """
    files = sorted(path for path in folder.iterdir() if _type_of(path) and not path.name.startswith("."))
    files = [path for path in files if _type_of(path) != ".txt"] or files  # README.txt, LICENSE.txt
    if not files:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())[:8]
        hint = f"; its folders are {', '.join(inside)}" if inside else ""
        raise UnreadSource(f"{name!r} is a folder without data files ({', '.join(FILE_TYPES)}){hint}")
    types = sorted({_type_of(path) for path in files})
    if len(types) > 1:
        raise UnreadSource(
            f"{name!r} is a folder with files of several types ({', '.join(types)}); name those to read, for example "
            f"{folder}/*{types[0]}"
        )
    held_out = [path.name for path in files if _HELD_OUT.search(path.name.lower())]
    if held_out and len(held_out) < len(files):
        raise UnreadSource(
            f"{name!r} is a folder that also has files for evaluation ({', '.join(held_out[:3])}); name the file or "
            f"pattern to train on, and set data.held_out to the other{_neighbours(folder)}"
        )
    return files


def _type_of(path: Path) -> str:
    """Return the suffix that says how a file is read, without that of a compression; empty for other files."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in READERS else ""


def _file(path: Path, name: str) -> Iterator[Record]:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadSource(f"{name!r}: {reason}{_neighbours(path.parent)}") from None
    if not stat.S_ISREG(mode):
        raise UnreadSource(
            f"{name!r} is not a regular file; save its content as a regular file, or pipe it into the command and give "
            "`-`"
        )
    if name in STANDARD_INPUT:
        return json_rows.read(path, name)
    if not (suffix := _type_of(path)):
        raise UnreadSource(
            f"{name!r}: unsupported file type; use {', '.join(FILE_TYPES)}, which can be compressed "
            f"({', '.join(COMPRESSIONS)})"
        )
    return READERS[suffix](path, name)


def _neighbours(folder: Path) -> str:
    """List the data files in a folder, as the end of an error message."""
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir() if _type_of(path))
    return f". Data files in {folder}: {', '.join(names[:8])}" if names else ""


def _hub(name: str, configuration: str | None, split: str) -> Iterator[Record]:
    for number, row in enumerate(_hub_rows(name, configuration, split), 1):
        yield Record(f"{name}[{split}]:row {number}", row)


def _hub_rows(name: str, configuration: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 400)
        raise UnreadSource(
            f"{name!r} is not a local file, and cannot be loaded as a data set from the hub (split {split!r}): "
            f"{reason}\nCheck the spelling and the network. Without a network, copy a file of the data set to "
            "this machine and give its path"
        ) from error
