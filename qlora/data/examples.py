"""Tokenised documents in flat arrays, which are mapped from files: they need no memory of their own."""

import hashlib
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from qlora.errors import SaveError
from qlora.storage import cache

IGNORE_INDEX = -100
"""Label of a token that does not count in the loss."""

TOKEN_BYTES = 5
"""bytes of a stored token: its id, and one byte for trained or not"""

_READ_BYTES = 2**25  # bytes read in order before their pages are given back


class Example(NamedTuple):
    """One tokenised document, ready to train on."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T], aligned with input_ids; IGNORE_INDEX where untrained, always at 0
    origin: str
    """place in the source, as file:line"""


class Examples(Sequence[Example]):
    """A read-only sequence of documents. Each access makes an `Example` from the flat arrays.

    Args:
        tokens: int32 [N], the ids of all tokens, document after document.
        trained: bool [N], True where a token is trained.
        starts: int64 [n], first token of each document.
        lengths: int32 [n], tokens of each document.
        supervised: int32 [n], trained tokens of each document without its first token, which is never predicted.
        origins: place of each document in the source, as file:line.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        trained: NDArray[np.bool_],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int32],
        supervised: NDArray[np.int32],
        origins: Sequence[str],
    ) -> None:
        self._tokens = tokens
        self._trained = trained
        self._starts = starts
        self.lengths = lengths
        self.supervised = supervised
        self.origins = origins

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """Return the examples as `Examples`; copies those that are not."""
        if isinstance(examples, Examples):
            return examples
        with ExampleWriter() as writer:
            for ids, labels, origin in examples:
                writer.append(ids, labels, origin)
            return writer.examples()

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Example]:
        """Yield the documents in order. Pages that were read are given back, so a pass needs little resident memory."""
        read_bytes = 0
        for index in range(len(self)):
            yield self[index]
            read_bytes += int(self.lengths[index]) * TOKEN_BYTES
            if read_bytes >= _READ_BYTES:
                self._give_back()
                read_bytes = 0
        self._give_back()

    def _give_back(self) -> None:
        """Take the pages of mapped files out of this process; they stay in the system's cache."""
        for array in (self._tokens, self._trained):
            file: object = array.base
            if isinstance(file, mmap.mmap):
                file.madvise(mmap.MADV_DONTNEED)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        span = slice(int(self._starts[index]), int(self._starts[index]) + int(self.lengths[index]))
        ids = np.array(self._tokens[span], dtype=np.int32)
        labels = np.where(self._trained[span], ids, np.int32(IGNORE_INDEX))
        return Example(ids, labels, self.origins[index])

    def select(self, indices: Iterable[int]) -> "Examples":
        """Return the documents with these numbers, in this order. The tokens are shared, not copied."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return Examples(
            self._tokens,
            self._trained,
            self._starts[chosen],
            self.lengths[chosen],
            self.supervised[chosen],
            [self.origins[index] for index in chosen],
        )

    def add_to(self, digest: "hashlib._Hash") -> None:
        """Update a digest with the number of documents and with their token ids and labels, in order."""
        digest.update(len(self).to_bytes(8, "little"))
        for row in self:
            # the length first, so that different splits of the same tokens differ; little-endian on every machine
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(np.concatenate(row[:2]).astype("<i4").tobytes())

    @property
    def sha256(self) -> str:
        """SHA-256 of all token ids and labels in order: equal for the same rows, tokenizer and template only."""
        digest = hashlib.sha256()
        self.add_to(digest)
        return digest.hexdigest()

    @property
    def digests(self) -> set[bytes]:
        """Digests of the documents' token ids: as many as there are different documents."""
        return {_digest(row.input_ids) for row in self}

    def among(self, digests: set[bytes]) -> int:
        """Return the number of documents whose token ids have one of these digests."""
        return sum(_digest(row.input_ids) in digests for row in self)

    def save(self, folder: Path, name: str) -> None:
        """Write the tokens as `name`.tokens and `name`.trained, and the rest as `name`.npz."""
        with (
            (folder / f"{name}.tokens").open("wb") as tokens,
            (folder / f"{name}.trained").open("wb") as trained,
        ):
            for ids, labels, _ in self:
                tokens.write(ids.tobytes())
                trained.write((labels != IGNORE_INDEX).tobytes())
        np.savez(folder / f"{name}.npz", lengths=self.lengths, supervised=self.supervised)

    @classmethod
    def load(cls, folder: Path, name: str, origins: Sequence[str]) -> "Examples":
        """Map what `save` wrote.

        Raises:
            OSError, ValueError or KeyError: The files are damaged.
        """
        with np.load(folder / f"{name}.npz", allow_pickle=False) as rest:
            lengths, supervised = rest["lengths"], rest["supervised"]
        if len(origins) != len(lengths):
            raise ValueError(f"{len(lengths)} documents with {len(origins)} origins")
        total = int(lengths.sum(dtype=np.int64))
        return cls(
            _mapped(folder / f"{name}.tokens", np.int32, total),
            _mapped(folder / f"{name}.trained", np.bool_, total),
            _starts(lengths),
            lengths,
            supervised,
            origins,
        )


def _digest(tokens: NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


class ExampleWriter:
    """Collects examples in two temporary files without a name, which end with the process.

    Examples:
        >>> with ExampleWriter() as writer:
        ...     writer.append(ids, labels, "rows.jsonl:1")
        ...     examples = writer.examples()

    Raises:
        SaveError: The disk is full.
    """

    def __init__(self) -> None:
        self._tokens, self._trained = _temporary_file(), _temporary_file()
        self._lengths: list[int] = []
        self._supervised: list[int] = []
        self._origins: list[str] = []

    def __enter__(self) -> "ExampleWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()  # what is mapped stays readable
        self._trained.close()

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, ids: NDArray[np.int32], labels: NDArray[np.int32], origin: str) -> None:
        """Write one document; arguments as the fields of `Example`."""
        trained = labels != IGNORE_INDEX
        try:
            self._tokens.write(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
            self._trained.write(trained.tobytes())
        except OSError as error:
            raise _disk_full(error) from error
        self._lengths.append(len(ids))
        self._supervised.append(int(np.count_nonzero(trained[1:])))
        self._origins.append(origin)

    def examples(self) -> Examples:
        """Return everything that was written."""
        try:
            self._tokens.flush()
            self._trained.flush()
        except OSError as error:
            raise _disk_full(error) from error
        lengths = np.array(self._lengths, dtype=np.int32)
        total = int(lengths.sum(dtype=np.int64))
        return Examples(
            _mapped(self._tokens, np.int32, total),
            _mapped(self._trained, np.bool_, total),
            _starts(lengths),
            lengths,
            np.array(self._supervised, dtype=np.int32),
            self._origins,
        )


def _temporary_file() -> IO[bytes]:
    """Open a file in the folder of the cache, which has room for the tokens: /tmp is in memory on some machines."""
    root = cache.folder()
    try:
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=root)
    except OSError:
        return tempfile.TemporaryFile()


def _disk_full(error: OSError) -> SaveError:
    place = cache.folder() or tempfile.gettempdir()
    return SaveError(
        f"the tokens of the data set cannot be written to {place}: {error.strerror}; free space there, or set "
        "QLORA_CACHE to another folder"
    )


def _mapped(file: Path | IO[bytes], dtype: Any, total: int) -> NDArray[Any]:
    if total == 0:
        return np.zeros(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype=dtype, mode="r", shape=(total,))


def _starts(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.cumsum(lengths, dtype=np.int64) - lengths
