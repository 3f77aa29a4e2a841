"""Efficient Attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Features
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
        """log softmax over channels and log exp(k), normalised per channel; or q and k, over the count."""
        if self.normalisation == "scaling":
            return Features(lambda q: q * scale, _same, self.head_dim, normaliser="count")
        return Features(
            lambda q: torch.log_softmax(q * scale, dim=-1),
            _same,
            self.head_dim,
            log_domain=True,
            normaliser="channel",
        )

    def _scale(self, scale: float | None) -> float:
        return 1.0 if scale is None else float(scale)


def _same(k: Tensor) -> Tensor:
    return k
