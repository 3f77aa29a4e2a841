"""The linear Transformer."""

from __future__ import annotations

from ..contract import Features
from ..fast.maps import Maps
from ..fast.spec import Spec
from .base import FeatureMechanism


class Elu(FeatureMechanism):
    """Linear attention with phi(x) = elu(x) + 1; ``scale`` multiplies q, 1 by default since the formula has none.

    Cost: (N + S) x D x (Dv + 1) multiply-adds per head.
    Source: Katharopoulos et al. 2020, arXiv 2006.16236, equations 6 and 7; deviations: none.
    """

    name = "elu"

    def features(self, scale: float) -> Features:
        """elu(x) + 1, D features."""
        return Features.of(Maps(Spec("elu", scale=scale), Spec("elu")), self.head_dim)

    def _scale(self, scale: float | None) -> float:
        return 1.0 if scale is None else float(scale)
