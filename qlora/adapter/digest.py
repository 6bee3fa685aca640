"""Digests of tensors: whole up to 1 MiB, else 16 samples of 4 KiB, evenly spread from the first to the last byte."""

import hashlib
from collections.abc import Iterable

SAMPLES, SAMPLE_BYTES, WHOLE_BYTES = 16, 4096, 2**20


def digest(parts: Iterable[bytes]) -> str:
    """Return the BLAKE2b-128 digest of byte strings, each preceded by its length."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def sampled(size: int) -> tuple[list[int], int]:
    """Return the offsets of the samples in a tensor of `size` bytes, and the size of each."""
    if size <= WHOLE_BYTES:
        return [0], size
    last = size - SAMPLE_BYTES
    return [last * index // (SAMPLES - 1) for index in range(SAMPLES)], SAMPLE_BYTES
