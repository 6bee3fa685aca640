"""Row order of an epoch, as a pure function: a checkpoint stores counters, no generator state."""

import numpy as np
from numpy.typing import NDArray

SPLIT = 2**64 - 1
"""Reserved epoch number whose permutation chooses the held-out rows; no training epoch reaches it."""


def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of range(n), int64 [n], that depends only on (n, seed, epoch).

    Sorts the raw output of the counter-based generator Philox-4x64-10 (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011). NumPy guarantees this raw stream, while `Generator.permutation` can
    change between releases (NEP 19). A run can therefore resume under another NumPy version.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(n), kind="stable")
