"""Simulated random features: their mean and mean-square error over draws, for the closed forms to be held against."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.features import DEGREE_LAWS, rademacher
from ...core.kernels import Kernel
from ...core.maps import maclaurin_maps

MAX_DEGREE = 60
"""No law draws a higher one."""

_ONES = Kernel("ones", lambda n: 1.0, 1.0)
_BLOCK = 2**23  # numbers in one tensor of directions


def pair_of(cosine: float, head_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two unit vectors of that cosine, in a random direction. Shape: (D,), float64."""
    basis = torch.linalg.qr(torch.randn(head_dim, 2, dtype=torch.float64, generator=generator)).Q
    x, other = basis[:, 0], basis[:, 1]
    return x, cosine * x + (1 - cosine**2) ** 0.5 * other


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix of Sylvester, entries 1 and -1; size is a power of two. Shape: (size, size), float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def projections(sketch: str, vectors: Tensor, num_features: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """<w, v> of one rank, for every vector and ``num_draws`` draws of the directions of ``num_features`` features.

    Shape: vectors (V, D) -> (V, num_draws, M); complex-to-real: M / 2 complex numbers.
    """
    width = vectors.shape[-1]
    if sketch == "gaussian":
        w = torch.randn(num_draws, num_features, width, dtype=torch.float64, generator=generator)
    elif sketch == "rademacher":
        w = rademacher((num_draws, num_features, width), generator).double()
    elif sketch == "complex":
        quarter = torch.randint(0, 4, (num_draws, num_features // 2, width), generator=generator)
        w = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)[quarter]
        vectors = vectors.to(w.dtype)
    else:
        return _srht(vectors, num_features, num_draws, generator)
    return torch.einsum("tmd,vd->vtm", w, vectors)


def _srht(vectors: Tensor, num_features: int, num_draws: int, generator: torch.Generator) -> Tensor:
    width = vectors.shape[-1]
    blocks = -(-num_features // width)
    signs = rademacher((num_draws, blocks, width), generator).double()
    order = torch.rand(num_draws, blocks, width, generator=generator).argsort(-1)  # rows without replacement
    all_rows = (vectors[:, None, None] * signs) @ hadamard(width)  # (V, num_draws, blocks, D)
    drawn = all_rows.gather(-1, order.expand(len(vectors), -1, -1, -1))
    return drawn.flatten(-2)[..., :num_features]


def sketch_errors(
    sketch: str, pairs: Tensor, max_degree: int, num_features: int, num_draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bias and mean-square error of the estimates of <x, y>^n, for n = 1 to ``max_degree``.

    Directions are drawn ``num_draws`` times for each rank, and every combination of the ranks' draws counts: the
    averages over all num_draws^n estimates are products of the averages of single ranks. Both figures are unbiased, as
    ranks are independent; drawn one by one, products of high degree are so heavy-tailed that no sample would do.

    Args:
        sketch: see ``_variance.SKETCHES``.
        pairs: x and y of each pair.
        max_degree: the highest n.
        num_features: M, real ones.
        num_draws: draws for each rank.
        generator: of the draws.

    Shape: pairs (P, 2, D) -> two of (P, max_degree).
    """
    wanted = (pairs[:, 0] * pairs[:, 1]).sum(-1)  # (P,)
    biases, squares = [], []
    mean = conjugated = plain = torch.ones((), dtype=torch.float64)
    for degree in range(1, max_degree + 1):
        rank = _rank_moments(sketch, pairs, num_features, num_draws, generator)
        mean, conjugated, plain = mean * rank[0], conjugated * rank[1], plain * rank[2]
        first, second = mean.mean(-1).real, (conjugated + plain).mean((-2, -1)).real / 2
        target = wanted**degree
        biases.append(first - target)
        squares.append(second - 2 * target * first + target**2)
    return torch.stack(biases, -1), torch.stack(squares, -1)


def _rank_moments(
    sketch: str, pairs: Tensor, num_features: int, num_draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages of z_i (P, M), of z_i conj(z_j) and of z_i z_j (P, M, M) over the draws of one rank."""
    mean = conjugated = plain = torch.zeros((), dtype=torch.float64)
    block = max(1, _BLOCK // (num_features * pairs.shape[-1]))
    for start in range(0, num_draws, block):
        draws = min(block, num_draws - start)
        projected = projections(sketch, pairs.flatten(0, 1), num_features, draws, generator).unflatten(0, (-1, 2))
        z = projected[:, 0] * projected[:, 1].conj()  # (P, draws, M)
        mean = mean + z.sum(1) / num_draws
        conjugated = conjugated + z.mT @ z.conj() / num_draws
        plain = plain + z.mT @ z / num_draws if z.is_complex() else conjugated
    return mean, conjugated, plain


def kernel_estimates(
    law: str, coefficients: Tensor, pairs: Tensor, num_features: int, num_draws: int, generator: torch.Generator
) -> Tensor:
    """``num_draws`` independent estimates of sum_n c_n <x, y>^n by random Maclaurin features, for many c at once.

    The features are those of ``core.features`` for the series of ones, whose products are then weighted by c_n: one
    draw serves every kernel, and every radius r by c_n = a_n r^n.

    Args:
        law: of the degrees, a name of ``DEGREE_LAWS``.
        coefficients: c_n of each series.
        pairs: unit vectors x and y of each pair.
        num_features: M.
        num_draws: independent estimates.
        generator: of the draws.

    Shape: coefficients (MAX_DEGREE + 1, C), pairs (P, 2, D) -> (P, num_draws, C).
    """
    constant = 1 if law == "published" else 0
    drawn = num_features - constant
    block = max(1, _BLOCK // (2 * num_features * pairs.shape[-1]))
    found = []
    for start in range(0, num_draws, block):
        draws = min(block, num_draws - start)
        features = DEGREE_LAWS[law].features(_ONES, DEGREE_LAWS[law].draw(draws * drawn + constant, generator))
        directions = rademacher((1, pairs.shape[-1], features.num_directions), generator).double()
        maps = maclaurin_maps(features, directions, 1.0)
        phi = maps.of_queries(pairs.flatten(0, 1)[None, None])[0, 0].unflatten(0, (-1, 2))
        products = (phi[:, 0] * phi[:, 1])[:, : draws * drawn] * draws  # each estimate has a share of the features
        degrees = torch.tensor(features.degrees[: draws * drawn])
        # degrees come sorted; a random order makes them independent draws again
        estimate = torch.randperm(draws * drawn, generator=generator) % draws
        sums = products.new_zeros(len(pairs), draws * (MAX_DEGREE + 1))
        sums.index_add_(1, estimate * (MAX_DEGREE + 1) + degrees, products)
        if constant:
            sums[:, :: MAX_DEGREE + 1] += 1.0
        found.append(sums.unflatten(1, (draws, MAX_DEGREE + 1)) @ coefficients)
    return torch.cat(found, dim=1)
