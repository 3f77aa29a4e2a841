"""The relative error of a sequence from sampled rows, with an interval, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from maclin.core.confidence import student

MARGIN = 2.0
"""Errors above so many times the tolerance must be found, and those below the tolerance over it must pass."""


class Sums(NamedTuple):
    """What the host needs of the sampled rows of each sequence, (B,) each, in float64.

    error and size are means of ||out - exact||² and ||exact||² over the rows, variance and third are the second and
    third central moments of the mean of error - ratio size.
    """

    error: Tensor
    size: Tensor
    variance: Tensor
    third: Tensor


@dataclass(frozen=True)
class Estimate:
    """Relative error of one sequence: ||out - exact||_F / ||exact||_F over all heads and tokens.

    Attributes:
        rel_error: estimated.
        low: bound from below, with the confidence asked for.
        high: bound from above, with the same confidence.
        num_rows: sampled rows, over all heads.
    """

    rel_error: float
    low: float
    high: float
    num_rows: int

    @property
    def finite(self) -> bool:
        """Whether there is an error to speak of: NaN in the rows leaves none."""
        return not math.isnan(self.rel_error)


def row_sums(error: Tensor, size: Tensor, taken: Tensor, tokens: Tensor) -> Sums:
    """Means over rows, and the variance that the next draw would show.

    The estimate is a ratio of means, so its variance is that of d = error - ratio size to first order. Each stratum
    gives one row only, so neighbouring ones are taken together: (d_a - d_b)² / 4 is the variance of the mean of the
    two, too large by what the strata differ. The third moment is that of the rows of a head around their mean. What
    is sampled without replacement from few tokens varies less.

    Args:
        error: (B, H, R), ||out - exact||² of each row.
        size: (B, H, R), ||exact||².
        taken: (B, R), which of them count.
        tokens: (B,), of each sequence.
    """
    error, size = error.double(), size.double()
    weight = taken[:, None].double()
    number = (weight.sum((1, 2)) * error.shape[1]).clamp_min(1.0)
    error, size = error.where(taken[:, None], 0.0), size.where(taken[:, None], 0.0)
    of_error, of_size = error.sum((1, 2)) / number, size.sum((1, 2)) / number
    ratio = torch.where(of_size > 0, of_error / of_size, torch.zeros_like(of_error))
    residual = error - ratio[:, None, None] * size
    pairs = residual[..., : residual.shape[-1] // 2 * 2].unflatten(-1, (-1, 2))
    spread = (pairs[..., 0] - pairs[..., 1]).square().sum((1, 2)) / number.square()
    mean = residual.sum(-1, keepdim=True) / taken.sum(-1).clamp_min(1)[:, None, None]
    cubes = (residual - mean).where(taken[:, None], 0.0).pow(3).sum((1, 2)) / number.pow(3)
    unsampled = 1.0 - (taken.sum(-1) / tokens.clamp_min(1)).clamp_max(1.0)
    return Sums(of_error, of_size, spread * unsampled, cubes * unsampled)


def estimates(sums: Sums, taken: list[int], heads: int, confidence: float) -> list[Estimate]:
    """An interval for each sequence: from rel_error x exp(-t cv / 2) to rel_error x exp(u cv / 2).

    cv is the deviation of the squared error over it. The scale is logarithmic, because an error is never negative and
    few rows can lie far above the mean. t is Student's, with half of the pairs of rows as degrees of freedom, since
    such rows tell less of their spread than normal ones. Where rows are skewed, a sample with too few of the large ones
    shows a small mean and a small spread at once, so upwards u = t + skew (1 + 2 t²) / 6 (Hall 1992, Journal of the
    Royal Statistical Society B 54).

    Args:
        sums: of the rows.
        taken: rows of each sequence, per head.
        heads: H.
        confidence: of each bound.
    """
    found: list[Estimate] = []
    for (error, size, variance, third), rows in zip(torch.stack(sums, -1).tolist(), taken, strict=True):
        if not 0 < size < math.inf or not math.isfinite(error):
            rel_error = math.nan if math.isnan(error + size) else math.inf if error > 0 else 0.0
            found.append(Estimate(rel_error, rel_error, rel_error, rows * heads))
            continue
        rel_error = math.sqrt(error / size)
        spread = math.sqrt(variance) / error if error > 0 else 0.0
        down = student(confidence, max(rows * heads // 4, 1))
        up = down
        if variance > 0 and third > 0:
            up += third / variance**1.5 * (1 + 2 * down**2) / 6
        low, high = (math.exp(min(0.5 * times * spread, 300.0)) for times in (down, up))
        found.append(Estimate(rel_error, rel_error / low, rel_error * high, rows * heads))
    return found


def decision(estimate: Estimate, tolerance: float) -> Literal["within", "above", "open"]:
    """Whether an error counts as above the tolerance; "open" asks for more rows, and means "above" without them.

    Above: the estimate is above the tolerance, or its upper bound above ``MARGIN`` times it, so that a true error of
    that size passes only where the bound fails. Open: the bounds leave the other answer possible, too: the upper one
    alone is too high, or the estimate is above the tolerance while the true error may be below tolerance / ``MARGIN``.
    """
    if estimate.rel_error <= tolerance:
        return "within" if estimate.high <= MARGIN * tolerance else "open"
    return "above" if estimate.low >= tolerance / MARGIN else "open"


def share_that_escapes(num_rows: int, confidence: float) -> float:
    """The largest share of the rows that may all be missed: 1 - (1 - confidence)^(1 / rows).

    An error that sits in a larger share of the rows is met by at least one sampled row with that confidence.

    Args:
        num_rows: sampled rows.
        confidence: between 0 and 1.

    Example:
        >>> round(share_that_escapes(288, 0.99), 4)   # 32 rows of each of 9 heads
        0.0159
    """
    return -math.expm1(math.log1p(-confidence) / num_rows)
