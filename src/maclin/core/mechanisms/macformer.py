"""Macformer: Maclaurin feature attention, made stable by ppSBN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..algebra import grouped, per_key_head, wide
from ..budget import num_features_of
from ..calibration import (
    Calibration,
    calibrate_exact,
    calibrate_unbiased,
    fit_temperature,
    generator_of,
    softmax_rel_error,
    taken,
)
from ..confidence import CONFIDENCE
from ..contract import Features, attend
from ..design import Document, check_enough, documents, split
from ..errors import CapabilityError, InputError, OptionError
from ..fast.maps import Maps
from ..features import DEGREE_LAWS
from ..kernels import Kernel
from ..kernels import kernel as kernel_of
from ..maps import DrawnMap, MaclaurinMap, TaylorMap
from ..norms import BatchStatistics, PostScale, batch_standardise, token_standardise
from ..prediction import predicted_rel_error
from ..stratified import assumed
from ..stratified_map import StratifiedMap
from ..unbiased import counts_of
from .base import Exponent, FeatureMechanism, State, check_choice, kernel_option

ESTIMATORS = ("stratified", *DEGREE_LAWS, "taylor")
_Moments = tuple[Tensor, Tensor]
_LEAST_TEMPERATURE = 0.05
_KERNELS = ("exp", "inv", "log", "sqrt")  # that "auto" tries; trigh is exp
_DOMAIN = 0.95 / math.sqrt(3.0)  # of a finite radius: how far scale x temperature may go; see the class


class Macformer(FeatureMechanism):
    """Kernel attention with weights f(t), t = temperature x scale x q k, estimated by Maclaurin features.

    out = phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) with <phi(q), phi(k)> = f(t) up to what the estimator leaves out.
    With ppSBN q and k are first standardised and scaled to unit length, so that abs(t) <= temperature x scale, and
    out is then rescaled by gamma sign(out) abs(out)^beta.

    "stratified" has degrees 0 and 1 exactly and spends what is left of the budget on exact monomials. Built without
    data it assumes isotropic vectors of radius 1; ``maclin.calibrate`` returns one whose centres, bases and monomials
    are those that are worth most on given q, k and v (see ``core.design``), with the error that was measured on the
    part of the data that was held back. Where more features are hardly better than degrees 0 and 1, it has D + 1.
    With ``unbiased`` nothing is left out: all degrees that are not exact are drawn at random.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H); features are those of the key head, degrees are shared by all.
        kernel: "exp", "inv", "log", "sqrt", "trigh" or a ``maclin.Kernel``; "auto" is "exp" until ``calibrate``
            picks the one nearest to softmax attention on the data.
        num_features: M, the most that are used; None is max(128, 2 D). "auto" has D + 1 until ``calibrate`` finds the
            smallest number that keeps the error within ``tolerance``.
        tolerance: relative error of the attention output in (0, 1), with "auto" only.
        confidence: with "auto" only: how sure the tolerance is to be kept on other sequences, from 0.5 to below 1.
        estimator: "stratified"; "published" (one exact constant, degrees 1 to 20 with P(n) proportional to 2^-n);
            "kar_karnick" (every degree n >= 0 with P(n) = 2^-(n+1)); "taylor" (degrees 0 and 1 exactly, no more).
        unbiased: of "stratified": no truncation.
        counts: of "stratified": features of degree 0, 1, 2, ... instead of a choice, as (1, 64, 45, 18).
        centred: of "stratified" with exp: q and k are shifted by centres, which ``calibrate`` sets along with this.
        ppsbn: "token" (statistics of each vector), "batch" (statistics of each channel over batch and positions,
            running ones in eval mode) or False (raw q and k, and no rescaling of out).
        temperature: "fixed" (1), or "learned" per query head; it multiplies q, and starts at sqrt(D) where ppSBN
            would else hold |t| below 1/sqrt(D) and the kernel allows it, at 1 elsewhere. ``calibrate`` sets it to the
            least squares fit of the logits of raw q and k.
        generator: of the draw; None is torch's own.

    A kernel with a finite radius needs ppSBN, and scale x temperature stays below 0.95 / sqrt(3) = 0.548 of the
    radius by construction, in training too: up to 1 / sqrt(3) the variance of random features is finite for every
    pair of vectors, aligned ones included (mu <= 3 |x|^2 |y|^2 < 1).

    Raises:
        OptionError: unknown names (the message lists the known), too few features, options that exclude each other,
            or a kernel with a finite radius without ppSBN.

    Cost: (N + S) x (P x D + M x (Dv + 1)) multiply-adds per head: P is the sum of the degrees of random features, about
        2 M, but only the number of axes that exact monomials are made of.
    Source: Guo 2024, arXiv 2408.11656 (abstract), and the code of the same authors' arXiv 2505.12252 for the law of
        degrees and for per-token statistics; Kar & Karnick 2012, arXiv 1201.6530. Deviations: the sign and the
        smooth root of ppSBN's second half (see ``core.norms.PostScale``); the temperature; "stratified" is our own.
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
        num_features: int | Literal["auto"] | None = None,
        tolerance: float | None = None,
        confidence: float = CONFIDENCE,
        estimator: Literal["stratified", "published", "kar_karnick", "taylor"] = "stratified",
        unbiased: bool = False,
        counts: Sequence[int] | None = None,
        centred: bool = False,
        ppsbn: Literal["token", "batch", False] = "token",
        temperature: Literal["fixed", "learned"] = "fixed",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        check_choice(self.name, "estimator", estimator, ESTIMATORS)
        check_choice(self.name, "ppsbn", ppsbn, ("token", "batch", False))
        check_choice(self.name, "temperature", temperature, ("fixed", "learned"))
        self.kernel = kernel_of("exp" if kernel == "auto" else kernel)
        if ppsbn is False and math.isfinite(self.kernel.radius):
            raise OptionError(
                f"macformer: kernel {self.kernel.name!r} is defined for |t| < {self.kernel.radius:g} only, and "
                "ppsbn=False lets any t through; pass ppsbn='token' or 'batch', or kernel='exp'"
            )
        budget = num_features_of(
            self.kernel,
            head_dim,
            estimator=estimator,
            num_features=num_features,
            tolerance=tolerance,
            confidence=confidence,
            unbiased=unbiased,
            counts=counts,
            centred=centred,
        )
        self.estimator = estimator
        self.num_features = budget
        self.ppsbn = ppsbn
        self.config = {
            "kernel": kernel_option(kernel),
            "num_features": "auto" if num_features == "auto" else budget,
            "tolerance": tolerance,
            "confidence": confidence,
            "estimator": estimator,
            "unbiased": unbiased,
            "counts": None if counts is None else [int(count) for count in counts],
            "centred": centred,
            "ppsbn": ppsbn,
            "temperature": temperature,
        }
        self.q_statistics = BatchStatistics(self.num_heads, head_dim) if ppsbn == "batch" else None
        self.k_statistics = BatchStatistics(self.num_kv_heads, head_dim) if ppsbn == "batch" else None
        self.post = PostScale(num_heads) if ppsbn else None
        self.log_temperature = self._started(head_dim, num_heads) if temperature == "learned" else None
        self.map = self._build_map(budget, generator)
        self.calibration: Calibration | None = None
        """What ``maclin.calibrate`` chose; None where the mechanism was built without data."""

    def _started(self, head_dim: int, num_heads: int) -> nn.Parameter:
        # unit vectors and a scale of 1/sqrt(D) leave |t| <= 1/sqrt(D), where attention is all but uniform and hardly
        # learns to be anything else; the features are made for |t| <= 1
        start = 0.5 * math.log(head_dim) if self.ppsbn and math.isinf(self.kernel.radius) else 0.0
        return nn.Parameter(torch.full((num_heads,), start))

    def _build_map(self, budget: int, generator: torch.Generator | None) -> MaclaurinMap:
        sizes = (self.kernel, self.head_dim, self.num_kv_heads)
        if self.estimator == "taylor":
            return TaylorMap(*sizes)
        if self.estimator in DEGREE_LAWS:
            return DrawnMap(*sizes, budget, self.estimator, generator)
        counts, unbiased = self.config["counts"], self.config["unbiased"]
        growth = min(1.0, _DOMAIN * self.kernel.radius) ** 2
        if counts is None:
            counts = (
                counts_of(self.kernel, self.head_dim, budget, lambda n: growth ** (n / 2))
                if unbiased
                else assumed(self.kernel, self.head_dim, budget)
            )
        tail = budget - sum(counts) if unbiased else None
        return StratifiedMap(*sizes, counts, tail, growth, self.config["centred"], generator)

    @property
    def learns_from_data(self) -> bool:
        """Whether features, statistics, temperature or kernel come from data."""
        return (
            self.estimator == "stratified"
            or self.ppsbn == "batch"
            or self.log_temperature is not None
            or self.config["kernel"] == "auto"
        )

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw anew, in place, whatever is drawn: degrees and directions, or nothing."""
        self.map.resample_(generator)

    def temperature(self, scale: float) -> Tensor | None:
        """Temperature of each query head (H,), or None where it is fixed at 1.

        exp(theta); for a finite radius r: c sigmoid(theta + logit(1 / c)) with c = 0.548 r / scale. 1 at theta = 0.
        """
        if self.log_temperature is None:
            return None
        theta = wide(self.log_temperature)  # exp in half precision would round once more
        if math.isinf(self.kernel.radius):
            return theta.exp()
        limit = _DOMAIN * self.kernel.radius / scale
        return limit * torch.sigmoid(theta - math.log(limit - 1.0))

    def _set_temperature_(self, wanted: Tensor, scale: float) -> Tensor:
        """Set the learned temperature as near to ``wanted`` (H,) as the kernel allows; returns what it is then."""
        assert self.log_temperature is not None
        limit = math.inf if math.isinf(self.kernel.radius) else _DOMAIN * self.kernel.radius / scale
        wanted = wanted.clamp(_LEAST_TEMPERATURE, 0.99 * limit)
        theta = wanted.log()
        if math.isfinite(limit):
            theta = torch.logit(wanted / limit) + math.log(limit - 1.0)
        with torch.no_grad():
            self.log_temperature.copy_(theta)
        return wanted

    def features(self, scale: float, moments: tuple[_Moments, _Moments] | None = None) -> Features:
        """The maps, ppSBN's first half included; ``moments`` (of q, of k) replace the running statistics."""
        self._check_domain(scale)
        post = None if self.post is None or self.post.is_identity() else self.post
        if moments is None and not (torch.is_grad_enabled() and self._learns()):
            maps = self.kept_maps(lambda: self._maps(scale, None), scale, *self._tensors())
        else:
            maps = self._maps(scale, moments)
        if post is None:
            maps = replace(maps, gamma=None, beta=None)
        return Features.of(
            maps, self.map.num_features, num_projections=self.map.num_projections, post=post, floor=self.map.floor
        )

    def exponent(self, scale: float) -> Exponent | None:
        """exp(t) of what ppSBN leaves, for the exponential kernel; centred features leave out exp(scale q k_centre)."""
        if not self.kernel.is_exponential or self.ppsbn == "batch":  # whose statistics are those of a call
            return None
        query, key = self._normalisers(scale, None)
        centre = self.map.k_centre if isinstance(self.map, StratifiedMap) and self.map.centred else None
        plain = None if self.ppsbn or self.log_temperature is not None else scale
        if centre is None:
            return Exponent(lambda q: query(q) * scale, key, None, plain)

        def left_out(q: Tensor) -> Tensor:
            return per_key_head(query(q), centre.to(q.dtype)[..., None])[..., 0] * scale

        return Exponent(lambda q: query(q) * scale, key, left_out, plain)

    def _learns(self) -> bool:
        return any(x is not None and x.requires_grad for x in self._tensors())

    def _tensors(self) -> Iterator[Tensor | None]:
        """What the maps depend on."""
        yield from self.map._buffers.values()
        yield self.log_temperature
        for statistics in (self.q_statistics, self.k_statistics):
            if statistics is not None:
                yield from statistics.running

    def _maps(self, scale: float, moments: tuple[_Moments, _Moments] | None) -> Maps:
        maps = self.map.maps(scale)
        query, key = maps.query, maps.key
        q_weights, norm = maps.q_weights, self.ppsbn or ""
        temperature = self.temperature(scale)
        if temperature is not None and q_weights is not None:
            # t^n for products of n factors; the centre is that of q times the temperature
            powers = torch.tensor(self.map.powers, device=temperature.device)
            q_weights = grouped(q_weights[None].to(temperature), self.num_heads)[0] * temperature[:, None] ** powers
            if query.shift is not None:
                query = query.for_heads(self.num_heads)
                query = query._replace(shift=query.shift / temperature[:, None])  # pyright: ignore[reportOptionalOperand]
        if self.q_statistics is not None and self.k_statistics is not None:
            of_q, of_k = moments or (self.q_statistics.running, self.k_statistics.running)
            query = query.for_heads(self.num_heads)._replace(mean=of_q[0], variance=of_q[1])
            key = key._replace(mean=of_k[0], variance=of_k[1])
        return replace(
            maps,
            query_spec=replace(maps.query_spec, norm=norm),
            key_spec=replace(maps.key_spec, norm=norm),
            query=query,
            key=key,
            q_weights=q_weights,
            gamma=None if self.post is None else self.post.gamma,
            beta=None if self.post is None else self.post.beta,
        )

    def _check_domain(self, scale: float) -> None:
        limit = _DOMAIN * self.kernel.radius
        if scale >= limit:
            raise InputError(
                f"macformer: scale {scale:g} lets t come too near to the radius {self.kernel.radius:g} of kernel "
                f"{self.kernel.name!r}: wanted a scale below {limit:.3g}, where the variance is finite for every pair "
                "of vectors; pass a smaller scale or kernel='exp'"
            )

    def normalised(self, q: Tensor, k: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """What is left to the kernel: q (B, H, N, D) after ppSBN's first half and temperature, and k likewise."""
        norm_q, norm_k = self._normalisers(self._scale(scale), None)
        return norm_q(q), norm_k(k)

    def _normalisers(
        self, scale: float, moments: tuple[_Moments, _Moments] | None
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        temperature = self.temperature(scale)
        norm_q, norm_k = self._norms(moments)

        def query(q: Tensor) -> Tensor:
            q = norm_q(q)
            return q if temperature is None else q * temperature.to(q.dtype)[:, None, None]

        return query, norm_k

    def calibrated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Macformer:
        """A new mechanism with what it learns from data: kernel, statistics, temperature, features."""
        if self.config["kernel"] == "auto":
            return self._with_best_kernel(q, k, v, key_mask, is_causal, scale)
        made = copy.deepcopy(self)
        scale = self._scale(scale)
        self._check_domain(scale)
        q, k, v = (x.detach() for x in (q, k, v))
        if made.q_statistics is not None and made.k_statistics is not None:
            made.q_statistics.set_from(q, _query_mask(q, k, key_mask))
            made.k_statistics.set_from(k, key_mask)
        fitted: tuple[float, ...] = ()
        if made.log_temperature is not None:
            norm_q, norm_k = made._norms(None)
            wanted = fit_temperature(q, k, norm_q(wide(q)), norm_k(wide(k)), key_mask, is_causal)
            fitted = tuple(made._set_temperature_(wanted.to(made.log_temperature), scale).tolist())
        if self.estimator != "stratified":
            if not all(bool(x.isfinite().all()) for x in made.state_dict().values()):
                raise InputError("macformer: the calibration data hold NaN or infinity; wanted finite q, k and v")
            return made
        docs = made._documents(q, k, v, key_mask, is_causal, scale)
        asked = self.config["num_features"]
        if self.config["unbiased"]:
            found, calibration = calibrate_unbiased(docs, self.kernel, scale, self.num_features, generator_of(self.map))
        else:
            found, calibration = calibrate_exact(
                docs,
                self.kernel,
                scale,
                num_features=asked,
                tolerance=self.config["tolerance"],
                counts=self.config["counts"],
                confidence=self.config["confidence"],
            )
        made.map = _moved(found, self.map)
        made.num_features = calibration.num_features if asked == "auto" else self.num_features
        made.calibration = replace(calibration, temperature=fitted)
        made.config |= {
            "num_features": made.num_features,
            "tolerance": None,
            "confidence": CONFIDENCE,
            "counts": list(calibration.counts),
            "centred": self.kernel.is_exponential,
        }
        return made

    def _with_best_kernel(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Macformer:
        """The kernel whose output is nearest to softmax attention, tried on sequences that were held back."""
        names = [name for name in _KERNELS if self._scale(scale) < _DOMAIN * kernel_of(name).radius]
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
        known = list(range(q.shape[0])) if key_mask is None else key_mask.any(-1).nonzero()[:, 0].tolist()
        learn, held = split(known)
        errors: list[tuple[str, float]] = []
        for name in names if self.ppsbn else ("exp",):
            tried = self._like(name).calibrated(*taken(learn, q, k, v, key_mask), **options).eval()
            errors.append((name, softmax_rel_error(tried, *taken(held, q, k, v, key_mask), **options)))
        errors.sort(key=lambda pair: pair[1])
        made = self._like(errors[0][0]).calibrated(q, k, v, key_mask, **options)
        if made.calibration is not None:
            made.calibration = replace(made.calibration, kernels=tuple(errors))
        return made

    def _like(self, kernel: str) -> Macformer:
        """The same with another kernel, statistics, parameters and what was drawn included."""
        options: dict[str, Any] = self.config | {"kernel": kernel}
        other = Macformer(self.head_dim, self.num_heads, self.num_kv_heads, generator=generator_of(self.map), **options)
        if isinstance(self.map, DrawnMap):  # its law knows no kernel
            other.map.load_state_dict(self.map.state_dict())
        made = copy.deepcopy(self)
        made.kernel, made.config, made.map = other.kernel, other.config, _moved(other.map, self.map)
        return made

    def predicted_rel_error(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> tuple[float, ...]:
        """Per key head, the relative error of its attention output to expect on these q, k and v.

        Against exact kernel attention on what ppSBN leaves, without ppSBN's second half, on sampled rows: what is
        exact in the features is compared, what is random adds its closed-form variance; see ``core.prediction``.

        Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S) -> Hk numbers.
        """
        self.check_inputs(q, k, v, key_mask)
        self.check_scale(scale)
        scale = self._scale(scale)
        docs = self._documents(q, k, v, key_mask, is_causal, scale)
        return tuple(predicted_rel_error(self.map, head, i, scale) for i, head in enumerate(docs))

    def _documents(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float
    ) -> list[list[Document]]:
        self._check_domain(scale)
        with torch.no_grad():
            x, y = self.normalised(wide(q), wide(k), scale)
            x, y = x * math.sqrt(scale), y * math.sqrt(scale)
            found = [documents(x, y, v, key_mask, is_causal, head) for head in range(self.num_kv_heads)]
        for head in found:
            check_enough(self.name, head, self.head_dim)
        return found

    def _norms(
        self, moments: tuple[_Moments, _Moments] | None
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if self.q_statistics is not None and self.k_statistics is not None:
            of_q, of_k = moments or (self.q_statistics.running, self.k_statistics.running)
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


def _query_mask(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """In self-attention the queries' padding is the keys'; otherwise nothing is known of it."""
    return key_mask if q.shape[2] == k.shape[2] else None


def _moved(found: MaclaurinMap, like: MaclaurinMap) -> MaclaurinMap:
    """On the device, and in the dtype and mode, of another map of the same kind."""
    directions = dict(like.named_buffers()).get("directions")
    return (found if directions is None else found.to(directions)).train(like.training)


def _same(x: Tensor) -> Tensor:
    return x
