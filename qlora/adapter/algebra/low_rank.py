"""Low-rank matrices B A as pairs of thin factors: sums, norms, singular values and truncation without the product.

B [out, rank] and A [rank, in] have thin QR factors B = Q_b R_b and A^T = Q_a R_a, so B A = Q_b (R_b R_a^T) Q_a^T.
The small matrix R_b R_a^T has the norm and the singular values of B A, and one product gives the singular vectors. No
[out, in] matrix is formed. All arithmetic is float64, so errors are of the order of 1e-15 |B| |A|. Smaller singular
values count as zero, for example in the difference of two equal updates.

Factors with a further dimension in front hold a stack of matrices, such as one for each expert of a mixture. Each
operation works on every matrix of the stack. They share one rank, so `norm` and `energy` are those of the whole stack.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Extra columns of a sketch: its last singular values are not exact, so they are not used."""

ITERATIONS = 4
"""Subspace iterations; each raises the power of the singular values in the sketch by two."""

SMALL = 512
"""Matrices with at most this many rows or columns get a full decomposition."""

ROUNDING = 1e-14
"""Rounding error in float64, relative to |B| |A|; singular values below it are noise."""


@dataclass(frozen=True)
class LowRank:
    """The matrix B A, or a stack of such matrices, stored as its factors.

    Examples:
        >>> mixed = 0.7 * first + -0.3 * second
        >>> (mixed - mixed.nearest(8)).norm() / mixed.norm()
    """

    b: Tensor
    """[out, rank] or [stack, out, rank], float64"""
    a: Tensor
    """[rank, in] or [stack, rank, in], float64"""

    @classmethod
    def of(cls, b: Tensor, a: Tensor) -> "LowRank":
        """Convert factors of any floating dtype to float64."""
        return cls(b.double(), a.double())

    @classmethod
    def truncated(cls, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> "LowRank":
        """Build the matrix from the first `rank` triples of U [..., out, k], s [..., k] falling and V^T [..., k, in].

        Each factor gets the square root of the singular values, so that both have similar rounding errors.
        """
        root = s[..., :rank].double().sqrt()
        return cls(u[..., :rank].double() * root[..., None, :], root[..., None] * vh[..., :rank, :].double())

    def __add__(self, other: "LowRank") -> "LowRank":
        """Return the exact sum: the factors are concatenated, so the ranks add up."""
        return LowRank(torch.cat([self.b, other.b], -1), torch.cat([self.a, other.a], -2))

    def __rmul__(self, weight: float) -> "LowRank":
        return LowRank(weight * self.b, self.a)

    def __sub__(self, other: "LowRank") -> "LowRank":
        return self + -1.0 * other

    @property
    def rank(self) -> int:
        """Columns of B; the rank of the matrix itself can be lower."""
        return self.b.shape[-1]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [..., out, k], falling singular values [..., k] and V^T [..., k, in]; k = min(rank, out, in)."""
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        return q_b @ u, _without_noise(s, r_b, r_a), vh @ q_a.mT

    def singular_values(self) -> Tensor:
        """Return only the singular values [..., k] of `svd`, at half its cost."""
        r_b = torch.linalg.qr(self.b, mode="r").R
        r_a = torch.linalg.qr(self.a.mT, mode="r").R
        return _without_noise(torch.linalg.svdvals(r_b @ r_a.mT), r_b, r_a)

    def norm(self) -> float:
        """Return the Frobenius norm of B A, or of the whole stack."""
        return self.singular_values().norm().item()

    def nearest(self, rank: int | None = None, energy: float | None = None) -> "LowRank":
        """Return the best approximation of lower rank, by truncated SVD (Eckart and Young 1936).

        It has the smallest error of its rank in the Frobenius and the spectral norm.

        Args:
            rank: highest rank of the result.
            energy: share of the squared singular values to keep (0-1), in a stack of all its matrices together; the
                result has the lowest such rank. Without `rank` and `energy` the result keeps all of them.
        """
        u, s, vh = self.svd()
        return LowRank.truncated(u, s, vh, rank or enough(s, 1.0 if energy is None else energy))


def principal(matrix: Tensor, rank: int, random: torch.Generator) -> LowRank:
    """Return the best approximation of `matrix` [out, in] of this rank; of a large matrix, that in a `sketch`."""
    size, short = rank + OVERSAMPLING, min(matrix.shape)
    if short <= SMALL or 2 * size >= short:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vh = sketch(matrix, size, random)
    return LowRank.truncated(u, s, vh, rank)


def sketch(matrix: Tensor, size: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximately the first `size` singular triples of `matrix` [out, in].

    Subspace iteration on random columns (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), drawn from the CPU
    generator `random`.
    """
    columns = torch.randn(matrix.shape[1], size, generator=random)
    q = _orthonormal(matrix @ columns.to(matrix))
    for _ in range(ITERATIONS):
        q = _orthonormal(matrix @ _orthonormal(matrix.T @ q))
    # matrix is approximately Q (Q^T matrix), a product of two thin matrices
    return LowRank.of(q, q.T @ matrix).svd()


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def enough(singular_values: Tensor, energy: float) -> int:
    """Return the least number of leading singular values [..., k] that hold `energy` (0-1) of all squares; at least 1.

    The matrices of a stack get the same number; together they hold `energy`.
    """
    kept = pooled(singular_values).square().cumsum(0)
    # slightly less than exact: rounding can put a partial sum below its share
    wanted = energy * kept[-1] * (1 - ROUNDING)
    return min(int((kept < wanted).sum()) + 1, len(kept))


def pooled(singular_values: Tensor) -> Tensor:
    """Return the singular values [k] of a matrix, or the root of the sum of squares of those [stack, k] of a stack."""
    return singular_values if singular_values.ndim == 1 else torch.linalg.vector_norm(singular_values, dim=0)


def _without_noise(singular_values: Tensor, r_b: Tensor, r_a: Tensor) -> Tensor:
    norms = torch.linalg.matrix_norm(r_b) * torch.linalg.matrix_norm(r_a)
    return torch.where(singular_values > ROUNDING * norms[..., None], singular_values, 0.0)
