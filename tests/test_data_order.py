"""The order of an epoch is a pure function of (n, seed, epoch)."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.order import SPLIT, permutation


@given(n=st.integers(0, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
@settings(deadline=None)
def test_every_row_comes_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed, epoch).tolist()) == list(range(n))


def test_the_same_on_every_machine_and_under_every_numpy() -> None:
    # Fixed values: a run that is resumed on another machine must get this order again.
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 2**63, 41).tolist() == [6, 2, 5, 3, 1, 0, 8, 9, 4, 7]
    assert permutation(10, 0, SPLIT).tolist() == [7, 9, 8, 5, 0, 2, 4, 3, 6, 1]


def test_seed_epoch_and_split_each_change_the_order() -> None:
    orders = [permutation(1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (0, SPLIT)]]
    for index, order in enumerate(orders):
        for other in orders[index + 1 :]:
            # two independent permutations agree in one position on average
            assert (order == other).sum() < 12


def test_random_state_is_neither_read_nor_changed() -> None:
    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist()
    order = permutation(50, 1, 2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    random.seed(4)
    np.random.seed(4)
    assert (permutation(50, 1, 2) == order).all()


def test_every_position_is_reached_by_every_row() -> None:
    # 4 rows, 4,000 epochs: each of the 16 (row, position) pairs comes about 1,000 times, standard deviation 27
    counts = np.zeros((4, 4), dtype=int)
    for epoch in range(4000):
        counts[np.arange(4), permutation(4, 7, epoch)] += 1
    assert abs(counts - 1000).max() < 150
