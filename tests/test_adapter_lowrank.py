"""Products of thin matrices, compared without forming the product: equal to dense float64 linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.adapter.algebra.low_rank import LowRank, enough

SIZES = st.integers(1, 12)
WEIGHTS = st.floats(0.01, 3) | st.floats(-3, -0.01)


@st.composite
def products(draw: st.DrawFn, out: int, into: int) -> LowRank:
    """Draw a product of any rank, with columns of very different sizes that are sometimes linearly dependent."""
    rank = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sizes = 10.0 ** torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=rank, max_size=rank)))
    b = torch.randn(out, rank, generator=generator) * sizes
    if rank > 1 and draw(st.booleans()):
        b[:, 0] = b[:, 1]
    return LowRank.of(b, torch.randn(rank, into, generator=generator))


def dense(product: LowRank) -> Tensor:
    return product.b @ product.a


def close(found: Tensor | float, expected: Tensor | float, scale: LowRank) -> None:
    """Assert closeness, relative to |B| |A|."""
    size = (scale.b.norm() * scale.a.norm()).item()
    tensors = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(*tensors, rtol=0, atol=1e-13 * size)


@given(st.data(), SIZES, SIZES)
@settings(deadline=None, max_examples=40)
def test_norm_and_singular_values_are_those_of_the_product(data: st.DataObject, out: int, into: int) -> None:
    product = data.draw(products(out, into))
    matrix = dense(product)
    expected = torch.linalg.svdvals(matrix)
    u, s, vh = product.svd()
    count = min(out, into, product.rank)
    close(s, expected[:count], product)
    close(product.singular_values(), expected[:count], product)
    close(torch.zeros(len(expected) - count), expected[count:], product)
    close(product.norm(), matrix.norm(), product)
    close((u * s) @ vh, matrix, product)
    torch.testing.assert_close(u.T @ u, torch.eye(count).double())
    torch.testing.assert_close(vh @ vh.T, torch.eye(count).double())


@given(st.data(), SIZES, SIZES, WEIGHTS, WEIGHTS)
@settings(deadline=None, max_examples=40)
def test_sums_are_exact(data: st.DataObject, out: int, into: int, v: float, w: float) -> None:
    first, second = data.draw(products(out, into)), data.draw(products(out, into))
    total = v * first + w * second
    close(dense(total), v * dense(first) + w * dense(second), total)
    assert total.rank == first.rank + second.rank
    close(dense(first - second), dense(first) - dense(second), first - second)


@given(st.data(), SIZES, SIZES, st.integers(1, 10))
@settings(deadline=None, max_examples=40)
def test_nearest_is_the_best_approximation_of_its_rank(
    data: st.DataObject, out: int, into: int, rank: int
) -> None:
    """The error is the norm of the discarded singular values (Eckart-Young)."""
    product = data.draw(products(out, into))
    nearest = product.nearest(rank)
    assert nearest.rank == min(rank, out, into, product.rank)
    expected = torch.linalg.svdvals(dense(product))[rank:].norm()
    close((dense(nearest) - dense(product)).norm(), expected, product)
    close((product - nearest).norm(), expected, product)
    torch.testing.assert_close(nearest.a.norm(dim=1), nearest.b.norm(dim=0), msg="factors must round alike")


@given(st.data(), SIZES, SIZES, st.floats(0.01, 1))
@settings(deadline=None, max_examples=40)
def test_energy_keeps_the_fewest_directions_for_its_share(
    data: st.DataObject, out: int, into: int, energy: float
) -> None:
    product = data.draw(products(out, into))
    squares = torch.linalg.svdvals(dense(product)).square()
    kept = product.nearest(energy=energy).rank
    assert squares[:kept].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: kept - 1].sum() < energy * squares.sum() * (1 + 1e-9)


def test_products_that_cancel_give_zero() -> None:
    product = LowRank.of(torch.randn(30, 5), torch.randn(5, 20))
    assert (product - product).norm() == 0.0
    assert (0.1 * product - 0.1 * product).singular_values().tolist() == [0.0] * 10
    assert (product - product).nearest(energy=0.99).rank == 1
    assert product.norm() == pytest.approx(dense(product).norm().item())


@pytest.mark.parametrize(("energy", "expected"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.999, 2), (1.0, 2)])
def test_enough_counts_squares(energy: float, expected: int) -> None:
    assert enough(torch.tensor([2.0, 1.0, 0.0]).double(), energy) == expected


def test_the_product_is_never_formed() -> None:
    """The full product would take 320 GB."""
    product = LowRank.of(torch.ones(200_000, 2), torch.ones(2, 200_000))
    assert product.norm() == pytest.approx(2 * 200_000)
    assert (product - product.nearest(1)).norm() < 1e-12 * product.norm()
