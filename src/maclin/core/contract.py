"""The one contraction of all feature maps, in two phases: sums over keys, then a reading by queries.

    kv = sum_j phi(k_j) v_j^T        z = sum_j phi(k_j)        out_i = phi(q_i)^T kv / phi(q_i)^T z

Features are made block by block and never stored whole, so memory beyond q, k, v and out does not grow
with tokens x features. Sums are float32 (float64 for float64 inputs), whatever the dtype of q, k and v.

Features that are exponentials are handed over as logarithms (``Features.log_domain``). Their sums carry a
scale per feature, their readings a scale per row, as in a streaming log-sum-exp. These scales cancel in
out, so that they leak nothing between positions, samples or padding.

Denominator policy. A denominator phi(q)^T z is a sum of M products; where their cancellation leaves less
than 8 units of rounding of the largest value it could have had, |phi(q)| |z| (Cauchy-Schwarz), no digit of
it is right. Such a denominator is replaced by that threshold with its own sign (plus at zero). Negative
denominators are legitimate for unbiased random features and are kept. Both are counted where somebody asks
(``maclin.guarded``). A row that attends to no key is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import statistics
from .blocks import OutBlocks

_BLOCK_BYTES = 1 << 21  # of the features of one block; with less, calls cost more than caches save (docs/log.md)
_MIN_BLOCK = 64  # tokens; below this the matrix products are too thin
_CHUNK = 128  # tokens of a causal chunk: within it the similarities are exact and C x C


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
        block_width: numbers per token that making the features needs, if more than M.
        post: block of out (B, H, n, Dv) -> the same shape, applied last.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    num_features: int
    log_domain: bool = False
    normaliser: str = "sum"
    log_gate: Callable[[Tensor], Tensor] | None = None
    block_width: int = 0
    post: Callable[[Tensor], Tensor] | None = None


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
    denominator policy compares with; log_scale (B, H, n), or None for 0.
    """

    numerator: Tensor
    denominator: Tensor
    magnitude: Tensor
    log_scale: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_key_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, H, n, P) times weight (..., Hk, P, R): each query head uses the weight of its key head.

    Shape: weight is (Hk, P, R) or (B, Hk, P, R), Hk divides H; returns (B, H, n, R).
    """
    batch, heads, length, width = x.shape
    key_heads = weight.shape[-3]
    if heads == key_heads:
        return x @ weight
    grouped = x.reshape(batch, key_heads, heads // key_heads * length, width) @ weight
    return grouped.view(batch, heads, length, weight.shape[-1])


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
    scale_a, scale_b = _exp_difference(a.log_scale, top), _exp_difference(b.log_scale, top)
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
    total = empty_sums(k, v, features) if sums is None else sums
    for start, stop in _blocks(k, v, features):
        mask = None if key_mask is None else key_mask[:, start:stop]
        k_block = _wide(k[:, :, start:stop])
        log_gate = _log_gate(k_block, mask, features)
        total = _absorb(total, _key_features(k_block, mask, features), _wide(v[:, :, start:stop]), mask, log_gate)
    return total


def read(q: Tensor, sums: Sums, features: Features) -> Reading:
    """What queries q (B, H, n, D) read from the sums; one block, so n x M numbers are held."""
    phi = features.query(_wide(q))
    kv, z = sums.kv, sums.z
    count = sums.count[:, None, None].expand(phi.shape[:-1])
    if not features.log_domain:
        return _linear_reading(phi, kv, z, count, features)
    if features.normaliser == "channel":
        # exp(log_scale) cancels between kv and z; a feature without keys has z = 0 and kv = 0
        weights = per_key_head(phi.exp(), kv / torch.where(z == 0, torch.ones_like(z), z)[..., None])
        attends = (count > 0).to(weights.dtype)
        return Reading(weights, attends, attends)
    scaled = phi + _grouped(sums.log_scale, q.shape[1])[..., None, :]
    top = _top(scaled, -1)
    weights = (scaled - top[..., None]).exp()
    denominator = per_key_head(weights, z[..., None])[..., 0]
    return Reading(per_key_head(weights, kv), denominator, denominator, top)


def combine(*parts: Reading) -> Reading:
    """Readings of disjoint sets of keys under one normaliser."""
    if all(part.log_scale is None for part in parts):
        numerators, denominators, magnitudes = zip(*(part[:3] for part in parts), strict=True)
        return Reading(_total(numerators), _total(denominators), _total(magnitudes))
    scales: list[Tensor] = []
    for part in parts:
        scale = torch.zeros_like(part.denominator) if part.log_scale is None else part.log_scale
        # a part that attends to nothing must not set the scale: its own says nothing
        scales.append(scale.masked_fill(part.magnitude == 0, -torch.inf))
    top = scales[0]
    for scale in scales[1:]:
        top = torch.maximum(top, scale)
    weights = [_exp_difference(scale, top) for scale in scales]
    pairs = list(zip(parts, weights, strict=True))
    return Reading(
        _total(part.numerator * weight[..., None] for part, weight in pairs),
        _total(part.denominator * weight for part, weight in pairs),
        _total(part.magnitude * weight for part, weight in pairs),
        _finite(top),
    )


def finish(reading: Reading, out: Tensor | None = None) -> Tensor:
    """numerator / denominator under the denominator policy, in float32 or 64; rows that attend to nothing give 0.

    ``out`` (B, H, n, Dv), if given, is written to and returned; without gradients only.
    """
    denominator, magnitude = reading.denominator, reading.magnitude
    limits = torch.finfo(denominator.dtype)
    floor = (magnitude * (8 * limits.eps)).clamp_min(limits.tiny)
    small = denominator.abs() < floor
    negative = denominator < 0
    empty = (magnitude == 0) & (denominator == 0)
    if statistics.asked():
        statistics.count(empty, negative, small)
    safe = torch.where(small, torch.where(negative, -floor, floor), denominator)
    safe = torch.where(empty, torch.ones_like(safe), safe)
    return torch.div(reading.numerator, safe[..., None], out=out)


def attend(q: Tensor, k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention: sums of all keys, read by all queries.

    Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S); returns (B, H, N, Dv).
    Cost: (N + S) x M x (Dv + 1) multiply-adds per head, plus the features; memory beyond the tensors one
        block of features and M x (Dv + 1) sums per head.
    """
    return read_all(q, accumulate(k, v, features, key_mask), features, v)


def read_all(q: Tensor, sums: Sums, features: Features, v: Tensor) -> Tensor:
    """All queries read the sums, block by block; v gives out its dtype and width."""
    out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
    for start, stop in _blocks(q, v, features):
        _put(out, read(q[:, :, start:stop], sums, features), features)
    return out.whole()


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None, sums: Sums | None = None
) -> tuple[Tensor, Sums]:
    """Causal attention, chunk by chunk, continuing from what is known already.

    Within a chunk of C tokens the similarities phi(q_i)^T phi(k_j), j <= i, are made exactly; everything
    before it is read from the sums. The last query is aligned with the last key, so the first S - N keys
    are seen by every query. One new token is decoding, many are prefill, the result is the same.

    Shape: as ``attend`` with N <= S; returns out (B, H, N, Dv) and the sums of all keys.
    Cost: N x (C + M) x (M + Dv) multiply-adds per head, plus the features.
    """
    total = empty_sums(k, v, features) if sums is None else sums
    offset = k.shape[-2] - q.shape[-2]
    if offset:
        prefix_mask = None if key_mask is None else key_mask[:, :offset]
        total = accumulate(k[:, :, :offset], v[:, :, :offset], features, prefix_mask, total)
    out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
    for start in range(0, q.shape[-2], _CHUNK):
        stop = min(start + _CHUNK, q.shape[-2])
        keys = slice(offset + start, offset + stop)
        mask = None if key_mask is None else key_mask[:, keys]
        k_chunk, v_chunk = _wide(k[:, :, keys]), _wide(v[:, :, keys])
        phi_k = _key_features(k_chunk, mask, features)
        log_gate = _log_gate(k_chunk, mask, features)
        phi_q = features.query(_wide(q[:, :, start:stop]))
        if features.log_domain:
            reading = _log_chunk(phi_q, phi_k, v_chunk, total, features)
        else:
            reading = _linear_chunk(phi_q, phi_k, v_chunk, total, mask, log_gate, features)
        _put(out, reading, features)
        total = _absorb(total, phi_k, v_chunk, mask, log_gate)
    return out.whole(), total


def _linear_chunk(
    phi_q: Tensor,  # (B, H, C, M)
    phi_k: Tensor,  # (B, Hk, C, M)
    v: Tensor,  # (B, Hk, C, Dv)
    sums: Sums,
    mask: Tensor | None,  # (B, C)
    log_gate: Tensor | None,  # (B, Hk, C)
    features: Features,
) -> Reading:
    later = torch.ones(phi_q.shape[-2], phi_q.shape[-2], dtype=torch.bool, device=phi_q.device).triu_(1)
    similarity = per_key_head(phi_q, phi_k.mT).masked_fill(later, 0.0)
    keys = torch.ones_like(v[:, 0, :, 0]) if mask is None else mask.to(v.dtype)
    count = (sums.count[:, None] + keys.cumsum(-1))[:, None].expand(phi_q.shape[:-1])
    kv, z = sums.kv, sums.z
    if log_gate is not None:
        passed = log_gate.cumsum(-1)  # log of the product of gates up to and including each position
        decay = (passed[..., :, None] - passed[..., None, :]).masked_fill(later, -torch.inf).exp()
        weight = decay * -torch.expm1(log_gate)[..., None, :]
        similarity = similarity * _grouped(weight, phi_q.shape[1])
        phi_q = phi_q * _grouped(passed, phi_q.shape[1])[..., None].exp()
    before = _linear_reading(phi_q, kv, z, count, features)
    within = per_key_head(similarity, v)
    if features.normaliser == "count":
        return Reading(before.numerator + within, before.denominator, before.magnitude)
    return combine(before, Reading(within, similarity.sum(-1), similarity.abs().sum(-1)))


def _log_chunk(
    log_q: Tensor,  # (B, H, C, M)
    log_k: Tensor,  # (B, Hk, C, M)
    v: Tensor,  # (B, Hk, C, Dv)
    sums: Sums,
    features: Features,
) -> Reading:
    heads = log_q.shape[1]
    if features.normaliser == "channel":
        # per channel, the logarithm of the sum over the keys up to each position, the sums included
        nothing = sums.z == 0
        known = (sums.z.masked_fill(nothing, 1.0).log() + _finite(sums.log_scale)).masked_fill(nothing, -torch.inf)
        log_z = torch.cat([known[..., None, :], log_k], dim=-2).logcumsumexp(-2)[..., 1:, :]
        log_q = log_q - _finite(_grouped(log_z, heads))
    scaled = log_q + _grouped(sums.log_scale, heads)[..., None, :]
    top = _top(scaled, -1)
    weights = (scaled - top[..., None]).exp()
    denominator = per_key_head(weights, sums.z[..., None])[..., 0]
    parts = [Reading(per_key_head(weights, sums.kv), denominator, denominator, top)]
    # Every query reads its own key, then, in blocks of 1, 2, 4 ... keys, every second block the one before it. So each
    # block of keys has a scale per feature, as sums have, and a later key can never push an earlier row to zero.
    own = log_q + _grouped(log_k, heads)
    top = _top(own, -1)
    weight = (own - top[..., None]).exp().sum(-1)
    parts.append(Reading(weight[..., None] * _grouped(v, heads), weight, weight, top))
    length, size = log_q.shape[-2], 1
    pad = (1 << (length - 1).bit_length()) - length  # to a power of 2
    if pad:
        log_q, v = F.pad(log_q, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad))
        log_k = F.pad(log_k, (0, 0, 0, pad), value=-torch.inf)
    while size < length:
        parts.append(_block_before(log_q, log_k, v, size, length))
        size *= 2
    return combine(*parts)


def _block_before(
    log_q: Tensor,  # (B, H, C, M), C a power of 2
    log_k: Tensor,  # (B, Hk, C, M)
    v: Tensor,  # (B, Hk, C, Dv)
    size: int,
    length: int,
) -> Reading:
    """What queries of every second block of ``size`` tokens read from the block before theirs; the others nothing.

    Returns the readings of the first ``length`` queries.
    """

    def blocks(x: Tensor, which: int) -> Tensor:  # (B, Hk, heads of a group, C / (2 size), size, R)
        return x.unflatten(1, (v.shape[1], -1)).unflatten(3, (-1, 2, size))[..., which, :, :]

    def rows(x: Tensor) -> Tensor:  # what blocks returned -> (B, H, length, R)
        return F.pad(x, (0, 0, size, 0)).flatten(3, 4).flatten(1, 2)[:, :, :length]

    query, key = blocks(log_q, 1), blocks(log_k, 0)
    log_scale = _finite(key.detach().amax(-2, keepdim=True))
    scaled = query + log_scale
    top = _finite(scaled.detach().amax(-1, keepdim=True))
    similarity = (scaled - top).exp() @ (key - log_scale).exp().mT
    denominator = rows(similarity.sum(-1, keepdim=True))[..., 0]
    return Reading(rows(similarity @ blocks(v, 0)), denominator, denominator, rows(top)[..., 0])


def _linear_reading(phi: Tensor, kv: Tensor, z: Tensor, count: Tensor, features: Features) -> Reading:
    numerator = per_key_head(phi, kv)
    if features.normaliser == "count":
        return Reading(numerator, count, count)
    heads = phi.shape[1]
    denominator = (_grouped(z, heads)[..., None, :] @ phi.mT)[..., 0, :]
    # not vector_norm, which is many times slower where the tokens stand together in memory
    magnitude = (phi * phi).sum(-1).sqrt() * _grouped(torch.linalg.vector_norm(z, dim=-1), heads)[..., None]
    return Reading(numerator, denominator, magnitude)


def _absorb(sums: Sums, phi: Tensor, v: Tensor, mask: Tensor | None, log_gate: Tensor | None) -> Sums:
    keys = v.new_full((v.shape[0],), v.shape[-2]) if mask is None else mask.sum(-1).to(v.dtype)
    kv, z, log_scale, count = sums.kv, sums.z, sums.log_scale, sums.count + keys
    if log_scale.shape[-1]:
        top = torch.maximum(log_scale, phi.detach().amax(-2))
        shrink = _exp_difference(log_scale, top)
        kv, z, log_scale = kv * shrink[..., None], z * shrink, top
        phi = (phi - _finite(top)[..., None, :]).exp()
    if log_gate is not None:
        passed = log_gate.cumsum(-1)
        kept = passed[..., -1].exp()
        kv, z = kv * kept[..., None, None], z * kept[..., None]
        phi = phi * ((passed[..., -1:] - passed).exp() * -torch.expm1(log_gate))[..., None]
    batch, heads = v.shape[:2]
    kv = torch.baddbmm(kv.flatten(0, 1), phi.flatten(0, 1).mT, v.flatten(0, 1)).unflatten(0, (batch, heads))
    return Sums(kv, z + phi.sum(-2), log_scale, count)


def _key_features(k: Tensor, mask: Tensor | None, features: Features) -> Tensor:
    phi = features.key(k)
    if mask is None:
        return phi
    return phi.masked_fill(~mask[:, None, :, None], -torch.inf if features.log_domain else 0.0)


def _log_gate(k: Tensor, mask: Tensor | None, features: Features) -> Tensor | None:
    if features.log_gate is None:
        return None
    log_gate = features.log_gate(k)
    return log_gate if mask is None else log_gate.masked_fill(~mask[:, None], 0.0)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, Hk, ...) -> (B, H, ...): each query head gets the numbers of its key head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _top(logs: Tensor, dim: int) -> Tensor:
    """The largest logarithm, as a scale: it cancels in out, so no gradient passes through it."""
    return _finite(logs.detach().amax(dim))


def _finite(log_scale: Tensor) -> Tensor:
    """A scale that can be subtracted: minus infinity, the scale of nothing, becomes 0."""
    return log_scale.masked_fill(log_scale == -torch.inf, 0.0)


def _exp_difference(a: Tensor, top: Tensor) -> Tensor:
    return (a - _finite(top)).exp()


def _blocks(x: Tensor, v: Tensor, features: Features) -> Sequence[tuple[int, int]]:
    """Token ranges of x (B, H, N, D) whose features, or whatever is widest, fit in the cache."""
    length = x.shape[-2]
    width = max(features.num_features, v.shape[-1])
    block = _BLOCK_BYTES // max(4 * width * x.shape[0] * x.shape[1], 1)
    block = max(block - block % _MIN_BLOCK, _MIN_BLOCK)  # odd lengths cost matrix products a third of their rate
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _put(out: OutBlocks, reading: Reading, features: Features) -> None:
    numerator = reading.numerator
    place = out.place(numerator.shape[-2], numerator.dtype) if features.post is None else None
    if place is not None:
        finish(reading, out=place)
    else:
        block = finish(reading)
        out.add(block if features.post is None else features.post(block))
