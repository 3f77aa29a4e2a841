"""Efficient Attention."""

from __future__ import annotations

from ..contract import Features
from ..fast.maps import Maps
from ..fast.spec import Spec
from .base import FeatureMechanism, check_choice


class Efficient(FeatureMechanism):
    """rho_q(Q) (rho_k(K)^T V): context vectors per channel instead of weights per pair.

    ``normalisation="softmax"``: rho_q is a softmax over the channels of a query, rho_k a softmax over the
    positions of a channel. ``"scaling"``: both divide by sqrt(S), S the number of attended keys. Causal, the
    softmax over positions (or S) runs over the keys seen so far. ``scale`` multiplies q and is 1 by default,
    since the formula has none.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        normalisation: "softmax" or "scaling".

    Cost: (N + S) x D x Dv multiply-adds per head.
    Source: Shen et al. 2021, arXiv 1812.01243, section 3.2; deviation: the causal form, which the paper has not.
    """

    name = "efficient"

    def __init__(
        self, head_dim: int, num_heads: int, num_kv_heads: int | None = None, *, normalisation: str = "softmax"
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        check_choice(self.name, "normalisation", normalisation, ("softmax", "scaling"))
        self.normalisation = normalisation
        self.config = {"normalisation": normalisation}

    def features(self, scale: float) -> Features:
        """exp(q) and exp(k), normalised per query and per channel; or q and k, over the count."""
        if self.normalisation == "scaling":
            maps = Maps(Spec("identity", scale=scale), Spec("identity"))
            return Features.of(maps, self.head_dim, normaliser="count")
        maps = Maps(Spec("softmax", scale=scale), Spec("softmax"))
        return Features.of(maps, self.head_dim, normaliser="channel")

    def _scale(self, scale: float | None) -> float:
        return 1.0 if scale is None else float(scale)
