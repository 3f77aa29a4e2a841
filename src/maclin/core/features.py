"""What random features are drawn from: degrees, signs and directions. ``core.maps`` makes maps of a draw.

Directions have one draw per key head, (Hk, D, ...); query heads share that of their key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Kernel

PUBLISHED_MAX_DEGREE = 20


def elu_features(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, equation 7). Shape: (..., D) -> (..., D)."""
    # elu(x) + 1 as such has no digit left below -17 in float32, and 0 for all features of a query leaves no weights
    return torch.where(x > 0, x + 1.0, x.clamp(max=0.0).exp())


@dataclass(frozen=True)
class RandomMaclaurin:
    """Random Maclaurin features of a dot-product kernel (Kar & Karnick 2012, arXiv 1201.6530, algorithm 1).

    phi_i(x) = weight_i prod_{r <= n_i} <w_ir, x>, with w_ir Rademacher and weight_i = sqrt(a_n / expected number
    of features of degree n), so that E <phi(x), phi(y)> = f(<x, y>) = sum_n a_n <x, y>^n. The maps themselves are
    ``core.maps.maclaurin_maps``.

    Degrees are drawn once for all heads, largest first; the directions of each key head are its own. The
    directions of one rank r stand together, so that a block needs one matrix product and few multiplications.

    Args:
        degrees: degree n_i of each feature, in descending order.
        weights: scale of each feature.
    """

    degrees: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def num_directions(self) -> int:
        """Rademacher vectors per head: the sum of the degrees."""
        return sum(self.degrees)

    @property
    def counts_by_rank(self) -> list[int]:
        """How many features have degree >= 1, >= 2, and so on."""
        return [sum(degree >= rank for degree in self.degrees) for rank in range(1, max(self.degrees, default=0) + 1)]

    def columns(self, directions: Tensor, scale: float) -> Tensor:
        """The matrix that a block is multiplied with: directions with weights and scale^(1/2) folded in.

        Features of degree 0 get a column of zeros beside the first rank, to be filled with their constant.

        Shape: directions (Hk, D, sum of degrees) -> (Hk, D, M + sum of degrees - features of degree >= 1).
        """
        counts = self.counts_by_rank
        first = counts[0] if counts else 0
        weights = torch.tensor(self.weights[:first], dtype=directions.dtype, device=directions.device)
        constant = directions.new_zeros(*directions.shape[:-1], len(self.degrees) - first)
        return torch.cat([directions[..., :first] * weights, constant, directions[..., first:]], dim=-1) * scale**0.5


@dataclass(frozen=True)
class DegreeLaw:
    """How the degrees of random Maclaurin features are drawn.

    Args:
        draw: (M, generator) -> M degrees, in any order.
        expected: (n, M) -> expected number of features of degree n, by which a_n is divided.
    """

    draw: Callable[[int, torch.Generator | None], list[int]]
    expected: Callable[[int, int], float]

    def features(self, kernel: Kernel, degrees: Iterable[int]) -> RandomMaclaurin:
        """The map for degrees that were drawn from this law: weight sqrt(a_n / expected(n, M))."""
        ordered = tuple(sorted(degrees, reverse=True))
        m = len(ordered)
        return RandomMaclaurin(ordered, tuple(math.sqrt(kernel.coefficient(n) / self.expected(n, m)) for n in ordered))


def _draw_published(num_features: int, generator: torch.Generator | None) -> list[int]:
    probabilities = torch.tensor([2.0**-n for n in range(1, PUBLISHED_MAX_DEGREE + 1)], dtype=torch.float64)
    drawn = torch.multinomial(probabilities, num_features - 1, replacement=True, generator=generator)
    return [0, *(int(n) + 1 for n in drawn)]


def _draw_kar_karnick(num_features: int, generator: torch.Generator | None) -> list[int]:
    # P(U < 2^-n) = 2^-n = P(degree >= n): the binary exponent of a uniform number is geometric
    uniform = torch.rand(num_features, dtype=torch.float64, generator=generator)
    return [int(n) for n in (-torch.log2(uniform.clamp_min(2.0**-60))).floor()]


def _expected_published(n: int, num_features: int) -> float:
    return 1.0 if n == 0 else 2.0**-n / (1.0 - 2.0**-PUBLISHED_MAX_DEGREE) * (num_features - 1)


DEGREE_LAWS: dict[str, DegreeLaw] = {
    "published": DegreeLaw(_draw_published, _expected_published),
    "kar_karnick": DegreeLaw(_draw_kar_karnick, lambda n, m: 2.0 ** -(n + 1) * m),
}
"""published: the authors' code, one exact constant and degrees 1 to 20 with P(n) proportional to 2^-n for the other
M - 1; the terms above degree 20 are never drawn (below 1e-19 for exp at t = 1). kar_karnick: every degree n >= 0 with
P(n) = 2^-(n+1), Kar & Karnick's law with p = 2; unbiased."""


def rademacher(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Independent signs, +1 or -1 with probability 1/2 each, as float32."""
    return torch.randint(0, 2, shape, generator=generator).to(torch.float32) * 2 - 1


def orthogonal_directions(num_heads: int, head_dim: int, num: int, generator: torch.Generator | None) -> Tensor:
    """Normal vectors that are orthogonal in blocks of head_dim, with independent chi-distributed lengths.

    Shape: (num_heads, head_dim, num). Each column is distributed as a standard normal vector.
    Source: Yu et al. 2016 (orthogonal random features); Choromanski et al. 2021, section 2.4.
    """
    blocks: list[Tensor] = []
    for start in range(0, num, head_dim):
        width = min(head_dim, num - start)
        normal = torch.randn(num_heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[..., None, :]  # uniform over rotations
        lengths = torch.randn(num_heads, head_dim, width, generator=generator, dtype=torch.float64).norm(dim=-2)
        blocks.append(q[..., :width] * lengths[..., None, :])
    return torch.cat(blocks, dim=-1).to(torch.float32)
