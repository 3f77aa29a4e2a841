"""What all rows of out say without any exact attention: NaN, infinity, and lengths that no average of v has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SLACK = 1.01
"""Rounding of half precision may lengthen an average a little."""


@dataclass(frozen=True)
class Outliers:
    """Rows of one sequence that cannot be right.

    Attributes:
        nonfinite: rows with NaN or infinity.
        beyond: rows longer than every value that they may attend to.
        excess: sum over those of (||out|| - longest value)², a bound from below of the squared error.
        most: sum over all rows of (longest value)², a bound from above of ||exact||_F².
    """

    nonfinite: int
    beyond: int
    excess: float
    most: float

    def least_rel_error(self, size: float = math.inf) -> float:
        """The relative error is at least this, whatever was sampled.

        Args:
            size: ||exact||_F² as estimated from sampled rows; without it what it can be at most is taken.
        """
        if not self.excess > 0:
            return 0.0
        least = min(self.most, size)
        return math.sqrt(self.excess / least) if least > 0 else math.inf


def outliers(out: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool, valid: Tensor | None) -> list[Outliers]:
    """Rows of out (B, H, N, Dv) beside the values (B, Hk, S, Dv): exact attention averages, so ||exact|| <= max ||v||.

    Cost: one pass over out and one over v.

    Args:
        out: of the mechanism.
        v: values.
        key_mask: (B, S), True = attend.
        is_causal: then only the values before a query bound it.
        valid: (B, N), which queries are tokens; None where all are.
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    heads, num_queries = out.shape[1:3]
    length = torch.linalg.vector_norm(out, dim=-1, dtype=dtype)
    longest = torch.linalg.vector_norm(v, dim=-1, dtype=dtype)
    if key_mask is not None:
        longest = longest.masked_fill(~key_mask[:, None], 0.0)
    if is_causal:
        longest = longest.cummax(-1).values[..., v.shape[2] - num_queries :]
    else:
        longest = longest.amax(-1, keepdim=True).expand(-1, -1, num_queries)
    length = length.unflatten(1, (v.shape[1], -1))
    longest = longest[:, :, None]
    finite = length.isfinite()
    excess = torch.where(finite & longest.isfinite(), length - _SLACK * longest, torch.zeros_like(length)).clamp_min(
        0.0
    )
    if valid is not None:
        real = valid[:, None, None]
        finite, excess, longest = finite | ~real, excess * real, longest * real
    number = heads // v.shape[1]
    figures = torch.stack(
        [
            (~finite).flatten(1).sum(1).double(),
            (excess > 0).flatten(1).sum(1).double(),
            excess.flatten(1).square().sum(1, dtype=torch.float64),
            longest.flatten(1).square().sum(1, dtype=torch.float64) * number,
        ],
        -1,
    )
    return [Outliers(int(a), int(b), c, d) for a, b, c, d in figures.tolist()]
