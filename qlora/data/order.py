"""The order of an epoch: a pure function, so a checkpoint stores counters and no generator state."""

import numpy as np
from numpy.typing import NDArray

SPLIT = 2**64 - 1
"""The "epoch" whose permutation chooses the held-out rows; no real epoch reaches it."""


def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on (n, seed, epoch) alone. int64 [n].

    Sorts the raw output of the counter-based generator Philox-4x64-10 (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011). NumPy promises that raw stream for good, while
    `Generator.permutation` may change between releases (NEP 19): a run can be resumed under another NumPy.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(n), kind="stable")
