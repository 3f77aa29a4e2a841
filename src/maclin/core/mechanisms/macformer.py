"""Macformer: random Maclaurin feature attention, made stable by ppSBN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..contract import Features, attend
from ..errors import CapabilityError, InputError, OptionError
from ..features import DEGREE_LAWS, RandomMaclaurin, rademacher, taylor_features
from ..kernels import Kernel
from ..kernels import kernel as kernel_of
from ..norms import BatchStatistics, PostScale, batch_standardise, token_standardise
from .base import FeatureMechanism, Mechanism, State, check_choice, check_num_features, kernel_option

ESTIMATORS = (*DEGREE_LAWS, "taylor")
_DOMAIN_MARGIN = 0.95  # of a finite radius: how far a learned temperature may go
_Moments = tuple[Tensor, Tensor]


class Macformer(FeatureMechanism):
    """Kernel attention with weights f(t), t = temperature x scale x q k, estimated by random Maclaurin features.

    out = phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) with E <phi(q), phi(k)> = f(t). With ppSBN q and k are first
    standardised and scaled to unit length, so that abs(t) <= temperature x scale, and out is then rescaled by
    gamma sign(out) abs(out)^beta.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H); one draw of directions per key head, degrees shared by all.
        kernel: "exp", "inv", "log", "sqrt", "trigh" or a ``maclin.Kernel``.
        num_features: M. "taylor" uses D + 1 of them.
        estimator: "published" (one exact constant, degrees 1 to 20 with P(n) proportional to 2^-n), "kar_karnick"
            (every degree n >= 0 with P(n) = 2^-(n+1)), or "taylor" (constant and linear term exactly, no more).
        ppsbn: "token" (statistics of each vector), "batch" (statistics of each channel over batch and positions,
            running ones in eval mode) or False (raw q and k, and no rescaling of out).
        temperature: "fixed" (1), or "learned" per query head; it multiplies q. For a kernel with a finite radius
            the learned one stays within 0.95 of the radius by construction.
        generator: of the draw; None is torch's own.

    Raises:
        OptionError: unknown names (the message lists the known), too few features, or a kernel with a finite
            radius without ppSBN, which alone keeps abs(t) inside it.

    Cost: (N + S) x (sum of degrees (about 2 M) x D + M x (Dv + 1)) multiply-adds per head.
    Source: Guo 2024, arXiv 2408.11656 (abstract), and the code of the same authors' arXiv 2505.12252 for the law of
        degrees and for per-token statistics; Kar & Karnick 2012, arXiv 1201.6530. Deviations: the sign and the
        smooth root of ppSBN's second half (see ``core.norms.PostScale``); the temperature.
    """

    name = "macformer"
    degrees: Tensor
    directions: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        kernel: str | Kernel = "exp",
        num_features: int = 128,
        estimator: Literal["published", "kar_karnick", "taylor"] = "published",
        ppsbn: Literal["token", "batch", False] = "token",
        temperature: Literal["fixed", "learned"] = "fixed",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        check_choice(self.name, "estimator", estimator, ESTIMATORS)
        check_choice(self.name, "ppsbn", ppsbn, ("token", "batch", False))
        check_choice(self.name, "temperature", temperature, ("fixed", "learned"))
        check_num_features(self.name, num_features, head_dim + 1 if estimator == "taylor" else 2)
        self.kernel = kernel_of(kernel)
        if ppsbn is False and math.isfinite(self.kernel.radius):
            raise OptionError(
                f"macformer: kernel {self.kernel.name!r} is defined for |t| < {self.kernel.radius:g} only, and "
                "ppsbn=False lets any t through; pass ppsbn='token' or 'batch', or kernel='exp'"
            )
        self.num_features = num_features
        self.estimator = estimator
        self.ppsbn = ppsbn
        self.config = {
            "kernel": kernel_option(kernel),
            "num_features": num_features,
            "estimator": estimator,
            "ppsbn": ppsbn,
            "temperature": temperature,
        }
        self.q_statistics = BatchStatistics(self.num_heads, head_dim) if ppsbn == "batch" else None
        self.k_statistics = BatchStatistics(self.num_kv_heads, head_dim) if ppsbn == "batch" else None
        self.post = PostScale(num_heads) if ppsbn else None
        self.log_temperature = nn.Parameter(torch.zeros(num_heads)) if temperature == "learned" else None
        self._map: RandomMaclaurin | None = None
        if estimator != "taylor":
            self.register_buffer("degrees", torch.empty(0, dtype=torch.int64))
            self.register_buffer("directions", torch.empty(0))
            self.resample_(generator)

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw new degrees and directions, in place. Nothing is drawn for "taylor"."""
        if self.estimator == "taylor":
            return
        law = DEGREE_LAWS[self.estimator]
        self._map = law.features(self.kernel, law.draw(self.num_features, generator))
        shape = (self.num_kv_heads, self.head_dim, self._map.num_directions)
        self.degrees = torch.tensor(self._map.degrees, device=self.degrees.device)
        self.directions = rademacher(shape, generator).to(self.directions)

    def temperature(self, scale: float) -> Tensor | None:
        """Temperature of each query head (H,), or None where it is fixed at 1.

        exp(theta); for a finite radius r: c sigmoid(theta + logit(1 / c)) with c = 0.95 r / scale. 1 at theta = 0.
        """
        if self.log_temperature is None:
            return None
        if math.isinf(self.kernel.radius):
            return self.log_temperature.exp()
        limit = _DOMAIN_MARGIN * self.kernel.radius / scale
        return limit * torch.sigmoid(self.log_temperature - math.log(limit - 1.0))

    def features(self, scale: float, moments: tuple[_Moments, _Moments] | None = None) -> Features:
        """The maps, ppSBN's first half included; ``moments`` (of q, of k) replace the running statistics."""
        margin = _DOMAIN_MARGIN if self.log_temperature is not None else 1.0
        if scale >= margin * self.kernel.radius:
            raise InputError(
                f"macformer: scale {scale:g} lets t leave the domain |t| < {margin * self.kernel.radius:g} of kernel "
                f"{self.kernel.name!r}; pass a smaller scale or kernel='exp'"
            )
        phi, projections = self._phi(scale)
        temperature = self.temperature(scale)
        norm_q, norm_k = self._norms(moments)

        def query(q: Tensor) -> Tensor:
            q = norm_q(q)
            return phi(q if temperature is None else q * temperature.to(q.dtype)[:, None, None])

        def key(k: Tensor) -> Tensor:
            return phi(norm_k(k))

        m = self.head_dim + 1 if self.estimator == "taylor" else self.num_features
        post = None if self.post is None or self.post.is_identity() else self.post
        return Features(query, key, m, num_projections=projections, post=post)

    def calibrated(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Mechanism:
        """A copy whose running statistics (ppsbn="batch") are those of q and k."""
        copy = super().calibrated(q, k, v, key_mask)
        if isinstance(copy, Macformer) and copy.q_statistics is not None and copy.k_statistics is not None:
            copy.q_statistics.set_from(q, _query_mask(q, k, key_mask))
            copy.k_statistics.set_from(k, key_mask)
        return copy

    def _phi(self, scale: float) -> tuple[Callable[[Tensor], Tensor], int]:
        if self._map is None:
            half = math.sqrt(scale)
            return (lambda x: taylor_features(x * half, self.kernel)), 0
        maclaurin = self._map
        columns = maclaurin.columns(self.directions, scale)
        return (lambda x: maclaurin(x, columns.to(x.dtype))), maclaurin.num_directions

    def _norms(
        self, moments: tuple[_Moments, _Moments] | None
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if self.q_statistics is not None and self.k_statistics is not None:
            of_q, of_k = moments or (
                (self.q_statistics.running_mean, self.q_statistics.running_var),
                (self.k_statistics.running_mean, self.k_statistics.running_var),
            )
            return (lambda q: batch_standardise(q, *of_q)), (lambda k: batch_standardise(k, *of_k))
        return (token_standardise, token_standardise) if self.ppsbn else (_same, _same)

    def _moments(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[_Moments, _Moments] | None:
        if self.q_statistics is None or self.k_statistics is None:
            return None
        return self.q_statistics.of(q, _query_mask(q, k, key_mask)), self.k_statistics.of(k, key_mask)

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return attend(q, k, v, self.features(scale, self._moments(q, k, key_mask)), key_mask)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        if self.q_statistics is not None and self.training:
            raise CapabilityError(
                "macformer: ppsbn='batch' cannot be trained with is_causal=True, because statistics over time let the "
                "past see the future; pass ppsbn='token'"
            )
        return super()._causal(q, k, v, key_mask, scale, state)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # another draw has other degrees, and with them other shapes: take them over before the tensors are copied
        degrees, directions = (state_dict.get(prefix + key) for key in ("degrees", "directions"))
        if (
            self._map is not None
            and isinstance(degrees, Tensor)
            and degrees.shape == self.degrees.shape
            and directions is not None
        ):
            self._map = DEGREE_LAWS[self.estimator].features(self.kernel, (int(n) for n in degrees))
            shape = (self.num_kv_heads, self.head_dim, self._map.num_directions)
            self.directions = self.directions.new_empty(shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _query_mask(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """In self-attention the queries' padding is the keys'; otherwise nothing is known of it."""
    return key_mask if q.shape[2] == k.shape[2] else None


def _same(x: Tensor) -> Tensor:
    return x
