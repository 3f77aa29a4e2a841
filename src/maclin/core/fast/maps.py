"""The maps of queries and keys together: their plain form, and their way through the blocked operators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import statistics
from ..algebra import grouped
from . import causal_ops, ops
from .causal import Problem
from .kept import Kept
from .read import Finish
from .spec import MOST_EXPONENT, Side, Spec, features, log_weights

_NO_TENSORS = Side()


def _nothing_kept() -> Kept[Tensor]:
    # a function, since torch.compile cannot trace the construction of a subscripted class
    return Kept()


@dataclass(frozen=True)
class Maps:
    """<phi(q), phi(k)> = sum_m q_weights_m phi_m(q) k_weights_m phi_m(k).

    Args:
        query_spec: features of queries.
        key_spec: features of keys; the same family.
        query: tensors for queries, a row per key head or per query head.
        key: tensors for keys, a row per key head.
        q_weights: (H, F) or (Hk, F), or None for 1; not in the log domain.
        k_weights: (Hk, F); None where q_weights are.
        gamma: (H,) of ppSBN's second half, or None.
        beta: (H,) of the same.
    """

    query_spec: Spec
    key_spec: Spec
    query: Side = _NO_TENSORS
    key: Side = _NO_TENSORS
    q_weights: Tensor | None = None
    k_weights: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    _kept: Kept[Tensor] = field(default_factory=_nothing_kept, repr=False, compare=False)

    def of_queries(self, q: Tensor) -> Tensor:
        """Features (B, H, n, F) of q (B, H, n, D), or logarithms."""
        phi = features(self.query_spec, self.query.for_heads(q.shape[1]), q, of_keys=False)
        return phi if self.q_weights is None else phi * grouped(self.q_weights[None], q.shape[1])[0, :, None].to(phi)

    def of_keys(self, k: Tensor) -> Tensor:
        """Features (B, Hk, n, F) of k (B, Hk, n, D), or logarithms; weights included, cut ones counted."""
        if self.key_spec.weighted and statistics.asked():
            statistics.count_clamped(log_weights(self.key_spec, self.key, k.detach()).abs() > MOST_EXPONENT)
        phi = features(self.key_spec, self.key, k)
        return phi if self.k_weights is None else phi * self.k_weights[:, None].to(phi)

    def accumulate(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """kv, z and log_scale of all keys, as ``core.contract.Sums`` has them."""
        kv, z, log_scale = self.sums(k, v, key_mask)
        return *self.weighted(kv, z), log_scale

    def sums(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As ``accumulate``, but for the weights."""
        return ops.accumulate(k, v, key_mask, self.key, self.key_spec)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, floor: float) -> Tensor:
        """Out (B, H, N, Dv) in q's dtype, under the sum of all features; as ``accumulate`` and ``read``."""
        heads = q.shape[1]
        kv, z, log_scale = (grouped(x, heads) for x in self.sums(k, v, key_mask))
        return self._read(q, kv, z, log_scale, self.weights(kv, heads), floor)

    def read(self, q: Tensor, kv: Tensor, z: Tensor, log_scale: Tensor, floor: float) -> Tensor:
        """Out of all queries, in q's dtype; kv and z are those of the query heads or of the key heads."""
        heads = q.shape[1]
        kv, z, log_scale = (grouped(x, heads) for x in (kv, z, log_scale))
        weights = None if self.q_weights is None else grouped(self.q_weights[None].to(kv), heads)[0]
        return self._read(q, kv, z, log_scale, weights, floor)

    def _read(
        self, q: Tensor, kv: Tensor, z: Tensor, log_scale: Tensor, weights: Tensor | None, floor: float
    ) -> Tensor:
        if weights is not None:
            kv, z = kv * weights[..., None], z * weights
        constant = (kv[:, :, -1], z[:, :, -1]) if floor else (None, None)
        finish = Finish(floor, *constant, self.gamma, self.beta)
        return ops.read(q, kv, z, log_scale, finish, self.query.for_heads(q.shape[1]), self.query_spec)

    @property
    def has_causal(self) -> bool:
        """Whether ``causal`` can be called: features that are no logarithms, read under their own sum."""
        return not self.key_spec.log_domain and self.key_spec.family != "identity"

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kv: Tensor, z: Tensor, floor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Out (B, H, N, Dv) in q's dtype and the sums after the last token; kv, z are those before the first.

        Shape: q (B, H, N, D), k (B, Hk, N, D), v (B, Hk, N, Dv), key_mask (B, N).
        """
        heads = q.shape[1]
        weights = self.weights(kv, heads)
        kv, z = self.bare(kv, z)
        problem = Problem(
            q, k, v, key_mask, weights, kv, z, Finish(floor, gamma=self.gamma, beta=self.beta),
            self.query.for_heads(heads), self.key, self.query_spec, self.key_spec,
        )  # fmt: skip
        out, kv, z = causal_ops.causal(problem)
        return out, *self.weighted(kv, z)

    def weighted(self, kv: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of weighted features, of those that ``sums`` makes."""
        if self.k_weights is None:
            return kv, z
        weights = self.k_weights.to(kv)
        return kv * weights[..., None], z * weights

    def bare(self, kv: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse; of a feature with weight 0, which is never read, as they are."""
        if self.k_weights is None:
            return kv, z
        weights = self.k_weights.to(kv)
        weights = torch.where(weights == 0, torch.ones_like(weights), weights)
        return kv / weights[..., None], z / weights

    def weights(self, like: Tensor, heads: int) -> Tensor | None:
        """Weights of the products of features, (H, F)."""
        if self.q_weights is None or self.k_weights is None:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _product(self.q_weights, self.k_weights, like, heads)
        parts = (self.q_weights, self.k_weights, like.dtype, like.device, heads)
        return self._kept.get(lambda: _product(parts[0], parts[1], like, heads), parts)


def _product(q_weights: Tensor, k_weights: Tensor, like: Tensor, heads: int) -> Tensor:
    q_weights, k_weights = (grouped(x[None].to(like), heads)[0] for x in (q_weights, k_weights))
    return q_weights * k_weights
