"""Positive features: log phi_m(x) = <w_m, x> - scale |x|^2 / 2 - log(M) / 2, of the softmax kernel."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import math

from torch import Tensor

from .device import POSITIVE
from .launch import FeatureMap


def positive(
    directions: Tensor,  # (Hk, D, M)
    scale: float,  # of <q, k>
) -> FeatureMap:
    """The feature map of "positive" in ``core.fast.spec``, for vectors times scale^(1/2)."""
    m = directions.shape[-1]
    w = (directions.float() * math.sqrt(scale))[:, None].contiguous()
    return FeatureMap(POSITIVE, m, w, square=scale, offset=0.5 * math.log(m))
