"""The one contraction of all feature maps, in two phases: sums over keys, then a reading by queries.

    kv = sum_j phi(k_j) v_j^T        z = sum_j phi(k_j)        out_i = phi(q_i)^T kv / phi(q_i)^T z

Features are made block by block and never stored whole, so memory beyond q, k, v and out does not grow
with tokens x features. Sums are float32 (float64 for float64 inputs), whatever the dtype of q, k and v.

Features that are exponentials are handed over as logarithms (``Features.log_domain``). Their sums carry a
scale per feature, their readings a scale per row, as in a streaming log-sum-exp. These scales cancel in
out, so that they leak nothing between positions, samples or padding.

Denominator policy. A denominator phi(q)^T z is a sum of M products; where their cancellation leaves less
than 8 units of rounding of the sum of their magnitudes, no digit of it is right. Such a denominator is
replaced by that threshold with its own sign (plus at zero). Negative denominators are legitimate for unbiased
random features and are kept. Both are counted where somebody asks (``maclin.guarded``). A row that attends to no
key is exactly 0.

A truncated series can also give a row a denominator that is wrong in size. Where the last feature is a constant and
the keys are centred, the true denominator is at least what that feature alone gives it (Jensen's inequality, f being
convex). ``Features.floor`` is the share of it that must be there; in a row with less, everything beyond the constant
feature is shrunk by one factor s until it is: out = (n0 + s (n - n0)) / (d0 + s (d - d0)). So a row can lose its
contrast, but never its sign; such rows count as guarded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import statistics
from . import triton as kernels
from .algebra import accumulation_dtype, exp_difference, finite, grouped, per_key_head, top_of, wide
from .blocks import OutBlocks, token_blocks
from .fast.maps import Maps

_LEAST_BYTES, _MOST_BYTES = 1 << 20, 1 << 21  # of the features of a block; see docs/log.md


@dataclass(frozen=True)
class Features:
    """What the contraction needs to know of a mechanism.

    Args:
        query: block of q (B, H, n, D) -> features (B, H, n, M), or their logarithms.
        key: block of k (B, Hk, n, D) -> features (B, Hk, n, M), or their logarithms.
        num_features: M.
        log_domain: the maps return logarithms.
        normaliser: "sum" divides by phi(q)^T z; "channel" normalises each feature over the keys
            (phi_m(k_j) / z_m), after which nothing is left to divide by (log domain only); "count" divides
            by the number of attended keys.
        log_gate: block of k (B, Hk, n, D) -> log g <= 0 (B, Hk, n): the sums before a key are multiplied by
            its g, the key's own features by 1 - g (causal only).
        num_projections: inner products with a vector of width D that making the features of a token takes.
        post: block of out (B, H, n, Dv) -> the same shape, applied last.
        floor: least denominator, in shares of what the last feature gives it; 0 for none. Outside the log domain.
        maps: the same maps as numbers and tensors, where there is such a form; everything then runs block by block in
            operators of their own (``core.fast``), unless somebody counts what is guarded.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    num_features: int
    log_domain: bool = False
    normaliser: str = "sum"
    log_gate: Callable[[Tensor], Tensor] | None = None
    num_projections: int = 0
    post: Callable[[Tensor], Tensor] | None = None
    floor: float = 0.0
    maps: Maps | None = None

    @classmethod
    def of(cls, maps: Maps, num_features: int, **options: Any) -> Features:
        """The features that maps make; ``options`` are fields."""
        return cls(maps.of_queries, maps.of_keys, num_features, maps.key_spec.log_domain, maps=maps, **options)

    @property
    def fast(self) -> Maps | None:
        """The maps, where the blocked operators are to be used."""
        return None if statistics.asked() or self.log_gate is not None else self.maps


class Sums(NamedTuple):
    """What is known of the keys: a state of constant size, batch first.

    kv (B, Hk, M, Dv) and z (B, Hk, M) are both divided by exp(log_scale) (B, Hk, M), which is empty
    (B, Hk, 0) outside the log domain; count (B,) is the number of attended keys.
    """

    kv: Tensor
    z: Tensor
    log_scale: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] -- tuple.count is not needed here


class Reading(NamedTuple):
    """What a block of queries reads: all three divided by exp(log_scale), a scale per row.

    numerator (B, H, n, Dv), denominator (B, H, n), magnitude (B, H, n): the bound of |denominator| that the
    denominator policy compares with; log_scale (B, H, n), or None for 0; constant is what the last feature alone gives
    numerator and denominator, where there is a floor.
    """

    numerator: Tensor
    denominator: Tensor
    magnitude: Tensor
    log_scale: Tensor | None = None
    constant: tuple[Tensor, Tensor] | None = None


def empty_sums(k: Tensor, v: Tensor, features: Features) -> Sums:
    """The sums of no keys: zero, with log_scale minus infinity."""
    batch, key_heads, m = k.shape[0], k.shape[1], features.num_features
    like = v.new_empty(0, dtype=accumulation_dtype(v.dtype))
    return Sums(
        like.new_zeros(batch, key_heads, m, v.shape[-1]),
        like.new_zeros(batch, key_heads, m),
        like.new_full((batch, key_heads, m if features.log_domain else 0), -torch.inf),
        like.new_zeros(batch),
    )


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of two disjoint sets of keys; not for gated features, whose order matters."""
    if a.log_scale.shape[-1] == 0:
        return Sums(a.kv + b.kv, a.z + b.z, a.log_scale, a.count + b.count)
    top = torch.maximum(a.log_scale, b.log_scale)
    scale_a, scale_b = exp_difference(a.log_scale, top), exp_difference(b.log_scale, top)
    return Sums(
        a.kv * scale_a[..., None] + b.kv * scale_b[..., None],
        a.z * scale_a + b.z * scale_b,
        top,
        a.count + b.count,
    )


def accumulate(k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None, sums: Sums | None = None) -> Sums:
    """Add all keys to the sums, block by block.

    Args:
        k: (B, Hk, S, D).
        v: (B, Hk, S, Dv).
        features: the maps.
        key_mask: (B, S) bool, True = attend, or None.
        sums: what is known already; None starts from nothing.

    Cost: S x M x (Dv + 1) multiply-adds per key head, plus the features.
    """
    if features.fast is not None and k.shape[2] and k.shape[0]:
        count = v.new_full((k.shape[0],), k.shape[2], dtype=accumulation_dtype(v.dtype))
        if key_mask is not None:
            count = key_mask.sum(-1).to(count.dtype)
        found = Sums(*features.fast.accumulate(k, v, key_mask), count)
        return found if sums is None else merge(sums, found)
    total = empty_sums(k, v, features) if sums is None else sums
    for tokens in _blocks(k, v, features):
        mask = None if key_mask is None else key_mask[:, tokens]
        k_block = wide(k[:, :, tokens])
        log_gate = log_gate_of(k_block, mask, features)
        total = absorb(total, key_features(k_block, mask, features), wide(v[:, :, tokens]), mask, log_gate)
    return total


def read(q: Tensor, sums: Sums, features: Features) -> Reading:
    """What queries q (B, H, n, D) read from the sums; one block, so n x M numbers are held."""
    phi = features.query(wide(q))
    kv, z = sums.kv, sums.z
    count = sums.count[:, None, None].expand(phi.shape[:-1])
    if not features.log_domain:
        return linear_reading(phi, kv, z, count, features)
    if features.normaliser == "channel":
        # exp(log_scale) cancels between kv and z; a feature without keys has z = 0 and kv = 0
        weights = per_key_head(phi.exp(), kv / torch.where(z == 0, torch.ones_like(z), z)[..., None])
        attends = (count > 0).to(weights.dtype)
        return Reading(weights, attends, attends)
    scaled = phi + grouped(sums.log_scale, q.shape[1])[..., None, :]
    top = top_of(scaled, -1)
    weights = (scaled - top[..., None]).exp()
    denominator = per_key_head(weights, z[..., None])[..., 0]
    return Reading(per_key_head(weights, kv), denominator, denominator, top)


def combine(*parts: Reading) -> Reading:
    """Readings of disjoint sets of keys under one normaliser."""
    if all(part.log_scale is None for part in parts):
        numerators, denominators, magnitudes = zip(*(part[:3] for part in parts), strict=True)
        constant = None
        if any(part.constant is not None for part in parts):
            of_parts = [_constant_of(part) for part in parts]
            constant = (_total(n for n, _ in of_parts), _total(d for _, d in of_parts))
        return Reading(_total(numerators), _total(denominators), _total(magnitudes), None, constant)
    scales: list[Tensor] = []
    for part in parts:
        scale = torch.zeros_like(part.denominator) if part.log_scale is None else part.log_scale
        # a part that attends to nothing must not set the scale: its own says nothing
        scales.append(scale.masked_fill(part.magnitude == 0, -torch.inf))
    top = scales[0]
    for scale in scales[1:]:
        top = torch.maximum(top, scale)
    weights = [exp_difference(scale, top) for scale in scales]
    pairs = list(zip(parts, weights, strict=True))
    constant = None
    if any(part.constant is not None for part in parts):
        constant = (
            _total(_constant_of(part)[0] * weight[..., None] for part, weight in pairs),
            _total(_constant_of(part)[1] * weight for part, weight in pairs),
        )
    return Reading(
        _total(part.numerator * weight[..., None] for part, weight in pairs),
        _total(part.denominator * weight for part, weight in pairs),
        _total(part.magnitude * weight for part, weight in pairs),
        finite(top),
        constant,
    )


def _constant_of(part: Reading) -> tuple[Tensor, Tensor]:
    """What the floor keeps of a reading: all of it where there is no series, since there is nothing to shrink."""
    return part.constant or (part.numerator, part.denominator)


def finish(reading: Reading, out: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """numerator / denominator under the denominator policy, in float32 or 64; rows that attend to nothing give 0.

    ``out`` (B, H, n, Dv), if given, is written to and returned; without gradients only.
    """
    reading, shrunk = _shrunk(reading, floor)
    denominator, magnitude = reading.denominator, reading.magnitude
    limits = torch.finfo(denominator.dtype)
    least = (magnitude * (8 * limits.eps)).clamp_min(limits.tiny)
    small = denominator.abs() < least
    negative = denominator < 0
    empty = (magnitude == 0) & (denominator == 0)
    if statistics.asked():
        statistics.count(empty, negative, small if shrunk is None else small | shrunk)
    safe = torch.where(small, torch.where(negative, -least, least), denominator)
    safe = torch.where(empty, torch.ones_like(safe), safe)
    return torch.div(reading.numerator, safe[..., None], out=out)


def _shrunk(reading: Reading, floor: float) -> tuple[Reading, Tensor | None]:
    """The reading with its floor kept, and in which rows that took something; see the denominator policy."""
    if reading.constant is None:
        return reading, None
    numerator, denominator = reading.constant
    least = floor * denominator
    short = reading.denominator < least
    missing = torch.where(short, denominator - reading.denominator, torch.ones_like(denominator))
    share = torch.where(short, (denominator - least) / missing, torch.ones_like(denominator))
    return reading._replace(
        numerator=torch.lerp(numerator, reading.numerator, share[..., None]),
        denominator=torch.where(short, least, reading.denominator),
    ), short


def attend(q: Tensor, k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention: sums of all keys, read by all queries.

    Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S); returns (B, H, N, Dv).
    Cost: (N + S) x M x (Dv + 1) multiply-adds per head, plus the features; memory beyond the tensors one
        block of features and M x (Dv + 1) sums per head.
    """
    fast = features.fast
    by_kernels = None if fast is None else kernel_attention(q, k, v, features, fast, key_mask)
    if by_kernels is not None:
        return by_kernels
    if fast is not None and features.normaliser == "sum" and q.numel() and k.shape[2]:
        return fast.attend(q, k, v, key_mask, features.floor).to(v.dtype)
    return read_all(q, accumulate(k, v, features, key_mask), features, v)


def kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, features: Features, maps: Maps, key_mask: Tensor | None
) -> Tensor | None:
    """Out by Triton kernels, where they are turned on and have one; else None."""
    if not kernels.enabled() or features.normaliser == "count" or not q.numel() or not k.shape[2]:
        return None
    from .triton.dispatch import attend as by_kernels  # imports triton

    out = by_kernels(maps, q, k, v, key_mask, features.floor)
    return out if out is None or features.post is None else features.post(out)


def read_all(q: Tensor, sums: Sums, features: Features, v: Tensor) -> Tensor:
    """All queries read the sums, block by block; v gives out its dtype and width."""
    if features.fast is not None and q.numel():
        return _read_fast(q, sums, features, features.fast).to(v.dtype)
    out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
    for tokens in _blocks(q, v, features):
        put(out, read(q[:, :, tokens], sums, features), features)
    return out.whole()


def _read_fast(q: Tensor, sums: Sums, features: Features, maps: Maps) -> Tensor:
    """``read_all`` by the blocked operator, which knows sums and a denominator; other normalisers become such sums."""
    kv, z, log_scale = sums.kv, sums.z, sums.log_scale
    if features.normaliser == "count":
        kv = kv / sums.count.clamp_min(1.0)[:, None, None, None]
    elif features.normaliser == "channel":
        # exp(log_scale) cancels between kv and z; a feature without keys has z = 0 and kv = 0
        kv = kv / torch.where(z == 0, torch.ones_like(z), z)[..., None]
        z = (sums.count > 0).to(z.dtype)[:, None, None].expand_as(z)
        log_scale = log_scale[..., :0]
    return maps.read(q, kv, z, log_scale, features.floor)


def linear_reading(phi: Tensor, kv: Tensor, z: Tensor, count: Tensor, features: Features) -> Reading:
    """What features phi (B, H, n, M), not logarithms, read of kv and z; count (B, H, n) keys are behind each row."""
    numerator = per_key_head(phi, kv)
    if features.normaliser == "count":
        return Reading(numerator, count, count)
    heads = phi.shape[1]
    denominator = (grouped(z, heads)[..., None, :] @ phi.mT)[..., 0, :]
    magnitude = (grouped(z.detach().abs(), heads)[..., None, :] @ phi.detach().abs().mT)[..., 0, :]
    constant = None
    if features.floor:
        of_query = phi[..., -1]
        constant = (
            of_query[..., None] * grouped(kv[..., -1:, :], heads),
            of_query * grouped(z[..., -1:], heads),
        )
    return Reading(numerator, denominator, magnitude, None, constant)


def absorb(sums: Sums, phi: Tensor, v: Tensor, mask: Tensor | None, log_gate: Tensor | None) -> Sums:
    """The sums with one block of keys more, whose features phi (B, Hk, n, M) are masked already."""
    keys = v.new_full((v.shape[0],), v.shape[-2]) if mask is None else mask.sum(-1).to(v.dtype)
    kv, z, log_scale, count = sums.kv, sums.z, sums.log_scale, sums.count + keys
    if log_scale.shape[-1]:
        top = torch.maximum(log_scale, phi.detach().amax(-2))
        shrink = exp_difference(log_scale, top)
        kv, z, log_scale = kv * shrink[..., None], z * shrink, top
        phi = (phi - finite(top)[..., None, :]).exp()
    if log_gate is not None:
        passed = log_gate.cumsum(-1)
        kept = passed[..., -1].exp()
        kv, z = kv * kept[..., None, None], z * kept[..., None]
        phi = phi * ((passed[..., -1:] - passed).exp() * -torch.expm1(log_gate))[..., None]
    batch, heads = v.shape[:2]
    kv = torch.baddbmm(kv.flatten(0, 1), phi.flatten(0, 1).mT, v.flatten(0, 1)).unflatten(0, (batch, heads))
    return Sums(kv, z + phi.sum(-2), log_scale, count)


def key_features(k: Tensor, mask: Tensor | None, features: Features) -> Tensor:
    """Features of one block of keys, of masked ones those that add nothing."""
    phi = features.key(k)
    if mask is None:
        return phi
    return phi.masked_fill(~mask[:, None, :, None], -torch.inf if features.log_domain else 0.0)


def log_gate_of(k: Tensor, mask: Tensor | None, features: Features) -> Tensor | None:
    """Gates (B, Hk, n) of one block of keys, open where masked; None without gates."""
    if features.log_gate is None:
        return None
    log_gate = features.log_gate(k)
    return log_gate if mask is None else log_gate.masked_fill(~mask[:, None], 0.0)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _blocks(x: Tensor, v: Tensor, features: Features) -> Iterator[slice]:
    """Blocks of the tokens of x (B, H, N, D), of which features and values are made."""
    width = max(features.num_features, v.shape[-1])
    return token_blocks(x.shape[2], 4 * width * x.shape[0] * x.shape[1], _LEAST_BYTES, _MOST_BYTES)


def put(out: OutBlocks, reading: Reading, features: Features) -> None:
    """Finish a reading and take it as the next block of out."""
    numerator = reading.numerator
    place = out.place(numerator.shape[-2], numerator.dtype) if features.post is None else None
    if place is not None:
        finish(reading, place, features.floor)
    else:
        block = finish(reading, None, features.floor)
        out.add(block if features.post is None else features.post(block))
