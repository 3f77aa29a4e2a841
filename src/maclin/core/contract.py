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
from typing import NamedTuple

import torch
from torch import Tensor

from . import statistics

_BLOCK_BYTES = 1 << 20  # features of one block: small enough for a core's second-level cache
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
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    num_features: int
    log_domain: bool = False
    normaliser: str = "sum"
    log_gate: Callable[[Tensor], Tensor] | None = None
    block_width: int = 0


class Sums(NamedTuple):
    """What is known of the keys: a state of constant size, batch first.

    kv (B, Hk, M, Dv) and z (B, Hk, M) are both divided by exp(log_scale) (B, Hk, M), which is empty
    (B, Hk, 0) outside the log domain; count (B,) is the number of attended keys.
    """

    kv: Tensor
    z: Tensor
    log_scale: Tensor
    count: Tensor


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
    like = {"dtype": accumulation_dtype(v.dtype), "device": v.device}
    return Sums(
        torch.zeros(batch, key_heads, m, v.shape[-1], **like),
        torch.zeros(batch, key_heads, m, **like),
        torch.full((batch, key_heads, m if features.log_domain else 0), -torch.inf, **like),
        torch.zeros(batch, **like),
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
    for start, stop in _blocks(k.shape[-2], k.shape[0] * k.shape[1], features):
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


def combine(a: Reading, b: Reading) -> Reading:
    """Two readings of disjoint sets of keys under one normaliser."""
    if a.log_scale is None and b.log_scale is None:
        return Reading(a.numerator + b.numerator, a.denominator + b.denominator, a.magnitude + b.magnitude)
    zero = torch.zeros_like(a.denominator)
    scale_a = zero if a.log_scale is None else a.log_scale
    scale_b = zero if b.log_scale is None else b.log_scale
    # a side that attends to nothing must not set the scale: its own says nothing
    scale_a = scale_a.masked_fill(a.magnitude == 0, -torch.inf)
    scale_b = scale_b.masked_fill(b.magnitude == 0, -torch.inf)
    top = _finite(torch.maximum(scale_a, scale_b))
    w_a, w_b = (scale_a - top).exp(), (scale_b - top).exp()
    return Reading(
        a.numerator * w_a[..., None] + b.numerator * w_b[..., None],
        a.denominator * w_a + b.denominator * w_b,
        a.magnitude * w_a + b.magnitude * w_b,
        top,
    )


def finish(reading: Reading, dtype: torch.dtype) -> Tensor:
    """numerator / denominator under the denominator policy; rows that attend to nothing give 0."""
    denominator, magnitude = reading.denominator, reading.magnitude
    floor = magnitude * (8 * torch.finfo(denominator.dtype).eps)
    small = denominator.abs() < floor
    negative = denominator < 0
    empty = magnitude == 0
    if statistics.asked():
        statistics.count(empty, negative, small)
    safe = torch.where(small, torch.where(negative, -floor, floor), denominator)
    safe = torch.where(empty, torch.ones_like(safe), safe)
    out = reading.numerator / safe[..., None]
    return out.to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention: sums of all keys, read by all queries.

    Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S); returns (B, H, N, Dv).
    Cost: (N + S) x M x (Dv + 1) multiply-adds per head, plus the features; memory beyond the tensors one
        block of features and M x (Dv + 1) sums per head.
    """
    return read_all(q, accumulate(k, v, features, key_mask), features, v)


def read_all(q: Tensor, sums: Sums, features: Features, v: Tensor) -> Tensor:
    """All queries read the sums, block by block; v gives out its dtype and width."""
    parts = (
        finish(read(q[:, :, start:stop], sums, features), v.dtype)
        for start, stop in _blocks(q.shape[-2], q.shape[0] * q.shape[1], features)
    )
    return _gather(parts, q, v)


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
    parts: list[Tensor] = []
    for start in range(0, q.shape[-2], _CHUNK):
        stop = min(start + _CHUNK, q.shape[-2])
        keys = slice(offset + start, offset + stop)
        mask = None if key_mask is None else key_mask[:, keys]
        k_chunk, v_chunk = _wide(k[:, :, keys]), _wide(v[:, :, keys])
        phi_k = _key_features(k_chunk, mask, features)
        log_gate = _log_gate(k_chunk, mask, features)
        phi_q = features.query(_wide(q[:, :, start:stop]))
        causal = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril_()
        if features.log_domain:
            reading = _log_chunk(phi_q, phi_k, v_chunk, total, causal, features)
        else:
            reading = _linear_chunk(phi_q, phi_k, v_chunk, total, causal, mask, log_gate, features)
        parts.append(finish(reading, v.dtype))
        total = _absorb(total, phi_k, v_chunk, mask, log_gate)
    return _gather(parts, q, v), total


def _linear_chunk(
    phi_q: Tensor,  # (B, H, C, M)
    phi_k: Tensor,  # (B, Hk, C, M)
    v: Tensor,  # (B, Hk, C, Dv)
    sums: Sums,
    causal: Tensor,  # (C, C) bool, True = attend
    mask: Tensor | None,  # (B, C)
    log_gate: Tensor | None,  # (B, Hk, C)
    features: Features,
) -> Reading:
    similarity = per_key_head(phi_q, phi_k.mT).masked_fill(~causal, 0.0)
    keys = torch.ones_like(v[:, 0, :, 0]) if mask is None else mask.to(v.dtype)
    count = (sums.count[:, None] + keys.cumsum(-1))[:, None].expand(phi_q.shape[:-1])
    kv, z = sums.kv, sums.z
    if log_gate is not None:
        passed = log_gate.cumsum(-1)  # log of the product of gates up to and including each position
        decay = (passed[..., :, None] - passed[..., None, :]).masked_fill(~causal, -torch.inf).exp()
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
    causal: Tensor,  # (C, C)
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
    before_top = _top(scaled, -1)
    weights = (scaled - before_top[..., None]).exp()
    denominator = per_key_head(weights, sums.z[..., None])[..., 0]
    before = Reading(per_key_head(weights, sums.kv), denominator, denominator, before_top)
    # A scale per key and one per query, not per feature: a later key can then never push an earlier row to zero
    q_top, k_top = _top(log_q, -1), log_k.detach().amax(-1)
    seen = _finite(k_top.cummax(-1).values)  # (B, Hk, C)
    lift = (k_top[..., None, :] - seen[..., :, None]).masked_fill(~causal, -torch.inf).exp()
    similarity = per_key_head((log_q - q_top[..., None]).exp(), (log_k - _finite(k_top)[..., None]).exp().mT)
    similarity = similarity * _grouped(lift, heads)
    denominator = similarity.sum(-1)
    within = Reading(per_key_head(similarity, v), denominator, denominator, q_top + _grouped(seen, heads))
    return combine(before, within)


def _linear_reading(phi: Tensor, kv: Tensor, z: Tensor, count: Tensor, features: Features) -> Reading:
    numerator = per_key_head(phi, kv)
    if features.normaliser == "count":
        return Reading(numerator, count, count)
    denominator = per_key_head(phi, z[..., None])[..., 0]
    bound = torch.linalg.vector_norm(z, dim=-1)
    magnitude = torch.linalg.vector_norm(phi, dim=-1) * _grouped(bound, phi.shape[1])[..., None]
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


def _blocks(length: int, rows: int, features: Features) -> Sequence[tuple[int, int]]:
    width = max(features.num_features, features.block_width, 1)
    block = max(_BLOCK_BYTES // (4 * width * max(rows, 1)), _MIN_BLOCK)
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _gather(parts: Iterable[Tensor], q: Tensor, v: Tensor) -> Tensor:
    shape = (*q.shape[:-1], v.shape[-1])
    if torch.is_grad_enabled():
        # writing into slices would make each block's backward copy the whole gradient
        tensors = list(parts)
        return torch.cat(tensors, dim=-2) if tensors else v.new_zeros(shape)
    out = v.new_empty(shape)
    start = 0
    for part in parts:
        out[..., start : start + part.shape[-2], :] = part
        start += part.shape[-2]
    return out
