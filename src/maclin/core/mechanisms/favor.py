"""FAVOR+: positive orthogonal random features of the softmax kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract import Features
from ..fast.maps import Maps
from ..fast.spec import Side, Spec
from ..features import orthogonal_directions
from .base import Exponent, FeatureMechanism, check_num_features


class Favor(FeatureMechanism):
    """Softmax attention estimated by positive features, phi(x) = exp(Wx - |x|^2 / 2) / sqrt(M).

    Unbiased in numerator and denominator, never negative, with exponents kept in the log domain so that no
    stabiliser looks at other positions or samples. The relative variance grows as exp(|x + y|^2).

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H); one draw per key head.
        num_features: M.
        generator: of the draw; None is torch's own.

    Cost: (N + S) x M x (D + Dv + 1) multiply-adds per head.
    Source: Choromanski et al. 2021, arXiv 2009.14794, section 2; deviation: the stabiliser is a running
        log-scale per feature, exact, instead of a maximum over all keys plus a small constant.
    """

    name = "favor"
    directions: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        num_features: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        check_num_features(self.name, num_features, 1)
        self.num_features = num_features
        self.config = {"num_features": num_features}
        self.register_buffer("directions", self._draw(generator))

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions, in place."""
        self.directions.copy_(self._draw(generator))

    def features(self, scale: float) -> Features:
        """Logarithms of the positive features of x scale^(1/2)."""
        maps = self.kept_maps(lambda: self._maps(scale), scale, self.directions)
        return Features.of(maps, self.num_features, num_projections=self.num_features)

    def exponent(self, scale: float) -> Exponent | None:
        """exp(scale q k)."""
        return Exponent.of_product(scale)

    def _maps(self, scale: float) -> Maps:
        spec = Spec("positive", scale=scale)
        side = Side(self.directions * math.sqrt(scale))
        return Maps(spec, spec, side, side)

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        return orthogonal_directions(self.num_kv_heads, self.head_dim, self.num_features, generator)
