"""Products of two thin matrices, added, judged and truncated without ever being multiplied out.

B [out, rank] and A [rank, in] have thin QR factors B = Q_b R_b and A^T = Q_a R_a, so B A = Q_b (R_b R_a^T) Q_a^T:
norm and singular values are those of the small matrix R_b R_a^T, singular vectors one product away. Nothing of
[out, in] is formed. All is float64: errors are of the order of 1e-15 times |B| |A|, and what is smaller counts
as zero, as in the difference of two equal updates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-14
"""Of a norm computed in float64, relative to |B| |A|: numbers below it are noise."""


@dataclass(frozen=True)
class LowRank:
    """The matrix B A, as `b` [out, rank] and `a` [rank, in], float64.

    >>> mixed = 0.7 * first + -0.3 * second
    >>> (mixed - mixed.nearest(8)).norm() / mixed.norm()
    """

    b: Tensor
    a: Tensor

    @classmethod
    def of(cls, b: Tensor, a: Tensor) -> "LowRank":
        """From factors of any floating dtype."""
        return cls(b.double(), a.double())

    @classmethod
    def truncated(cls, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> "LowRank":
        """The leading `rank` triples of U [out, k], s [k] in falling order and V^T [k, in].

        The square roots of the singular values go to either side, so that both factors round alike.
        """
        root = s[:rank].double().sqrt()
        return cls(u[:, :rank].double() * root, root[:, None] * vh[:rank].double())

    def __add__(self, other: "LowRank") -> "LowRank":
        """The exact sum: the factors side by side, the ranks added."""
        return LowRank(torch.cat([self.b, other.b], 1), torch.cat([self.a, other.a], 0))

    def __rmul__(self, weight: float) -> "LowRank":
        return LowRank(weight * self.b, self.a)

    def __sub__(self, other: "LowRank") -> "LowRank":
        return self + -1.0 * other

    @property
    def rank(self) -> int:
        """Columns of B; the matrix itself may have a lower one."""
        return self.b.shape[1]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, k], singular values [k] in falling order, V^T [k, in], with k = min(rank, out, in)."""
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, _without_noise(s, r_b, r_a), vh @ q_a.T

    def singular_values(self) -> Tensor:
        """Those of `svd` [k] alone, at half the cost."""
        r_b = torch.linalg.qr(self.b, mode="r").R
        r_a = torch.linalg.qr(self.a.T, mode="r").R
        return _without_noise(torch.linalg.svdvals(r_b @ r_a.T), r_b, r_a)

    def norm(self) -> float:
        """The Frobenius norm of B A."""
        return self.singular_values().norm().item()

    def nearest(self, rank: int | None = None, energy: float | None = None) -> "LowRank":
        """The best approximation of at most `rank`, or of the least rank that keeps `energy` (0-1); else of its own.

        It has the smallest error of its rank in the Frobenius and the spectral norm (Eckart and Young 1936).
        """
        u, s, vh = self.svd()
        return LowRank.truncated(u, s, vh, rank or enough(s, 1.0 if energy is None else energy))


def enough(singular_values: Tensor, energy: float) -> int:
    """The fewest of the falling singular values [k] whose squares make up `energy` (0-1) of all; at least 1."""
    kept = singular_values.square().cumsum(0)
    # a hair below, for the sum of all is not always the last of its own partial sums
    wanted = energy * kept[-1] * (1 - ROUNDING)
    return min(int((kept < wanted).sum()) + 1, len(kept))


def _without_noise(singular_values: Tensor, r_b: Tensor, r_a: Tensor) -> Tensor:
    floor = ROUNDING * r_b.norm() * r_a.norm()
    return torch.where(singular_values > floor, singular_values, 0.0)
