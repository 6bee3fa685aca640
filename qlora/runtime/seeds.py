"""Randomness as a function of counters, so that there is no state to save."""

import hashlib


def fold_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def key_of(name: str) -> int:
    """A number for a name, for `fold_seed`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
