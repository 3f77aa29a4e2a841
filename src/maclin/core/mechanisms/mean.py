"""The average of the values: the baseline that every approximation has to beat."""

from __future__ import annotations

from torch import Tensor

from ..contract import Features
from .base import FeatureMechanism


class Mean(FeatureMechanism):
    """Uniform attention: out_i is the mean of the values that query i may attend to.

    Cost: S x Dv additions per head.
    Source: the "uniform" baseline; phi(x) = 1 in the one contraction.
    """

    name = "mean"

    def features(self, scale: float) -> Features:
        """phi(x) = 1, one feature."""

        def one(x: Tensor) -> Tensor:
            return x.new_ones(*x.shape[:-1], 1)

        return Features(one, one, 1)
