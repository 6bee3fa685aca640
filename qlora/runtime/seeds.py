"""Seeds computed from counters, so that a checkpoint has no random state to save."""

import hashlib


def fold_seed(*numbers: int) -> int:
    """Hash several numbers to one 63-bit seed."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def key_of(name: str) -> int:
    """Hash a name to a 63-bit number for `fold_seed`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
