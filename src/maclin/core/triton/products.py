"""Random Maclaurin features and exact monomials: phi_m(x) = coefficient_m prod_r <w_(index_mr), x - centre>.

One common form for ``core.features.RandomMaclaurin`` and ``core.stratified_map.StratifiedMap``: a table says which
projections each feature multiplies, with one number for the constant 1. The kernels want the projections of a rank side
by side, so the table is resolved once, in ``products``.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import NoKernelError
from .device import PRODUCTS
from .launch import FeatureMap

MOST_RANKS = 32


def products(
    projections: Tensor,  # (Hk, D, P)
    index: Tensor,  # (M, R) int64; P stands for the constant 1
    coefficients: Tensor,  # (M,) or (Hk, M)
    centre: Tensor | None = None,  # (Hk, D), subtracted from x
    weight: Tensor | None = None,  # (Hk, D): each token's features times exp(<weight, x - centre>)
) -> FeatureMap:
    """The feature map of a table of products.

    Features of one degree should stand together: a block of features pays for the highest among them. A table that
    lies on the CPU is read without waiting for the device; make the map once and keep it.

    Raises:
        NoKernelError: degrees above ``MOST_RANKS``.
    """
    key_heads, _, number = projections.shape
    # the constants of a feature go to the end: its degree is how many projections stand before them
    ordered = torch.sort((index == number).to(torch.int8), dim=-1, stable=True).indices
    index = index.gather(-1, ordered)
    degrees = (index < number).sum(-1)
    ranks = max(1, int(degrees.max())) if degrees.numel() else 1
    if ranks > MOST_RANKS:
        raise NoKernelError(f"a feature of degree {ranks}: kernels take at most {MOST_RANKS}")
    index = F.pad(index, (0, ranks), value=number)[:, :ranks].to(projections.device)
    extended = F.pad(projections.float(), (0, 1))  # a column of zeros for the constant
    w = extended[..., index.mT].permute(0, 2, 1, 3).contiguous()  # (Hk, D, R, M) -> (Hk, R, D, M)
    return FeatureMap(
        PRODUCTS,
        index.shape[0],
        w,
        degrees.to(projections.device, torch.int32),
        coefficients.to(projections.device).float().expand(key_heads, -1).contiguous(),
        None if centre is None else centre.float().contiguous(),
        None if weight is None else weight.float().contiguous(),
    )


def of_columns(
    counts_by_rank: Sequence[int],
    constants: Sequence[float],
    columns: Tensor,  # (Hk, D, M + sum of counts_by_rank[1:])
    centre: Tensor | None = None,
    weight: Tensor | None = None,
) -> FeatureMap:
    """The feature map of what ``RandomMaclaurin.columns`` returns.

    Args:
        counts_by_rank: how many features have degree >= 1, >= 2, and so on; the highest degrees come first.
        constants: values of the features of degree 0, which come last.
        columns: the projections of the first rank, weights folded in, a column for each constant, then the other ranks.
        centre: as for ``products``.
        weight: as for ``products``.
    """
    first = counts_by_rank[0] if counts_by_rank else 0
    m = first + len(constants)
    projections = torch.cat([columns[..., :first], columns[..., m:]], -1)
    coefficients = torch.tensor([*(1.0,) * first, *constants])
    return products(projections, index_by_rank(counts_by_rank, m), coefficients, centre, weight)


def index_by_rank(counts_by_rank: Sequence[int], num_features: int) -> Tensor:
    """The table of ``RandomMaclaurin``, whose projections of one rank stand together, (M, ranks).

    Projection numbers are those of ``RandomMaclaurin.columns`` without its columns of zeros: ``counts_by_rank[0]`` of
    the first rank, then those of the second, and so on; features of degree 0 have only the constant.
    """
    total = sum(counts_by_rank)
    table = torch.full((num_features, max(1, len(counts_by_rank))), total)
    start = 0
    for rank, count in enumerate(counts_by_rank):
        table[:count, rank] = torch.arange(start, start + count)
        start += count
    return table
