"""Learned positive features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..algebra import grouped
from ..contract import Features
from ..features import orthogonal_directions
from ..transfer import transfer
from .base import Exponent, FeatureMechanism, check_choice, check_num_features


class Hedgehog(FeatureMechanism):
    """Softmax attention followed by positive features that are learned, per head of q and of k.

    phi(x) = exp(+-W^T x' + b - c |x'|^2), x' = scale^(1/2) x ("exp"); it begins as unbiased random features of the
    softmax kernel, c = 1/2 and e^b = (1/M)^(1/2), and keeps their scale, so that a window of exact weights can stand
    beside it (``hybrid``). Or phi(x) = softmax(+-W^T x' + b) over the M features ("softmax"), which is bounded.
    ``maclin.calibrate`` trains both sides on given q, k and v; so does whatever trains the model.

    Args:
        head_dim: D.
        num_heads: H; queries have maps of their own.
        num_kv_heads: Hk (default H).
        num_features: M, even: W is D x M / 2. None is max(128, 2 D).
        activation: "exp" or "softmax".
        generator: of the start; None is torch's own.

    Cost: (N + S) x M x (D / 2 + Dv + 1) multiply-adds per head.
    Source: Zhang et al. 2024, arXiv 2402.04347, section 4.1 and equation 6; the start is FAVOR+'s hyperbolic variant
        (Choromanski et al. 2021, arXiv 2009.14794, lemma 1). Deviations of "exp": start, bias per feature, and the
        term in |x|^2.
    """

    name = "hedgehog"

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        num_features: int | None = None,
        activation: str = "exp",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        num_features = max(128, 2 * head_dim) if num_features is None else num_features
        check_num_features(self.name, num_features, 2, multiple=2)
        check_choice(self.name, "activation", activation, ("exp", "softmax"))
        self.num_features = num_features
        self.activation = activation
        self.config = {"num_features": num_features, "activation": activation}
        directions = orthogonal_directions(self.num_kv_heads, head_dim, num_features // 2, generator)
        bias = -0.5 * math.log(num_features) if activation == "exp" else 0.0
        self.k_weight = nn.Parameter(directions)
        self.k_bias = nn.Parameter(torch.full((self.num_kv_heads, num_features), bias))
        self.q_weight = nn.Parameter(grouped(directions[None], num_heads)[0].clone())
        self.q_bias = nn.Parameter(torch.full((num_heads, num_features), bias))
        squares = activation == "exp"
        self.k_square = nn.Parameter(torch.full((self.num_kv_heads,), 0.5)) if squares else None
        self.q_square = nn.Parameter(torch.full((num_heads,), 0.5)) if squares else None

    @property
    def learns_from_data(self) -> bool:
        """True."""
        return True

    def calibrated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Hedgehog:
        """A copy whose maps were trained against exact attention; see ``core.transfer``."""
        return transfer(self, q, k, v, key_mask, is_causal=is_causal, scale=scale)

    def features(self, scale: float) -> Features:
        """Logarithms of the learned features of x scale^(1/2)."""
        root = math.sqrt(scale)

        def of(weight: Tensor, bias: Tensor, square: Tensor | None, x: Tensor) -> Tensor:
            x = x * root
            u = x @ weight.to(x.dtype)
            u = torch.cat([u, -u], dim=-1) + bias.to(x.dtype)[:, None]
            if square is None:
                return u.log_softmax(-1)
            return u - square.to(x.dtype)[:, None, None] * x.square().sum(-1, keepdim=True)

        return Features(
            lambda q: of(self.q_weight, self.q_bias, self.q_square, q),
            lambda k: of(self.k_weight, self.k_bias, self.k_square, k),
            self.num_features,
            log_domain=True,
            num_projections=self.num_features // 2,
        )

    def exponent(self, scale: float) -> Exponent | None:
        """exp(scale q k) of "exp"; softmax features are on no such scale."""
        return Exponent.of_product(scale) if self.activation == "exp" else None
