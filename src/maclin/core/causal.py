"""Causal contraction: exact within a chunk, everything before it read from the sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .algebra import finite, grouped, per_key_head, top_of, wide
from .blocks import OutBlocks
from .contract import (
    Features,
    Reading,
    Sums,
    absorb,
    accumulate,
    combine,
    empty_sums,
    key_features,
    linear_reading,
    log_gate_of,
    put,
)
from .native.causal_logs import causal_logs, takes_logs

_CHUNK = 128  # tokens of a chunk: within it the similarities are exact and C x C


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
    k, v = k[:, :, offset:], v[:, :, offset:]
    mask = None if key_mask is None else key_mask[:, offset:]
    fast = features.fast
    if fast is not None and features.normaliser == "sum" and q.numel():
        if fast.has_causal:
            out, kv, z = fast.causal(q, k, v, mask, total.kv, total.z, features.floor)
            return out.to(v.dtype), Sums(kv, z, total.log_scale, _counted(total.count, q, mask))
        sides, specs = (fast.query.for_heads(q.shape[1]), fast.key), (fast.query_spec, fast.key_spec)
        if features.post is None and takes_logs(q, k, v, mask, sides, specs):

            def plain(
                q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor, log_scale: Tensor
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                out, last = _chunk_by_chunk(q, k, v, features, mask, Sums(kv, z, log_scale, total.count))
                return out, last.kv, last.z, last.log_scale

            given = (total.kv, total.z, total.log_scale)
            out, kv, z, log_scale = causal_logs(q, k, v, given, mask, sides, specs, plain)
            return out, Sums(kv, z, log_scale, _counted(total.count, q, mask))
    return _chunk_by_chunk(q, k, v, features, mask, total)


def _counted(count: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
    return count + (count.new_full((q.shape[0],), q.shape[2]) if mask is None else mask.sum(-1))


def _chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, features: Features, mask: Tensor | None, total: Sums
) -> tuple[Tensor, Sums]:
    out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
    last = total
    for _, reading, after in causal_readings(q, k, v, features, mask, total):
        put(out, reading, features)
        last = after
    return out.whole(), last


def causal_readings(
    q: Tensor, k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None, total: Sums
) -> Iterator[tuple[slice, Reading, Sums]]:
    """Chunk by chunk: which queries, what they read of all keys up to their own, and the sums after the chunk.

    Shape: q (B, H, N, D), k (B, Hk, N, D), v (B, Hk, N, Dv); key_mask (B, S), whose last N entries are of these keys.
    """
    length = q.shape[-2]
    mask = None if key_mask is None else key_mask[:, key_mask.shape[1] - length :]
    for start in range(0, length, _CHUNK):
        tokens = slice(start, min(start + _CHUNK, length))
        mask_chunk = None if mask is None else mask[:, tokens]
        k_chunk, v_chunk = wide(k[:, :, tokens]), wide(v[:, :, tokens])
        phi_k = key_features(k_chunk, mask_chunk, features)
        log_gate = log_gate_of(k_chunk, mask_chunk, features)
        phi_q = features.query(wide(q[:, :, tokens]))
        if features.log_domain:
            reading = _log_chunk(phi_q, phi_k, v_chunk, total, features)
        else:
            reading = _linear_chunk(phi_q, phi_k, v_chunk, total, mask_chunk, log_gate, features)
        total = absorb(total, phi_k, v_chunk, mask_chunk, log_gate)
        yield tokens, reading, total


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
        similarity = similarity * grouped(weight, phi_q.shape[1])
        phi_q = phi_q * grouped(passed, phi_q.shape[1])[..., None].exp()
    before = linear_reading(phi_q, kv, z, count, features)
    within = per_key_head(similarity, v)
    if features.normaliser == "count":
        return Reading(before.numerator + within, before.denominator, before.magnitude)
    constant = None
    if features.floor:
        of_query, of_key = phi_q[..., -1], phi_k[..., -1]
        heads = phi_q.shape[1]
        constant = (
            of_query[..., None] * grouped((of_key[..., None] * v).cumsum(-2), heads),
            of_query * grouped(of_key.cumsum(-1), heads),
        )
    return combine(before, Reading(within, similarity.sum(-1), similarity.abs().sum(-1), None, constant))


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
        known = (sums.z.masked_fill(nothing, 1.0).log() + finite(sums.log_scale)).masked_fill(nothing, -torch.inf)
        log_z = torch.cat([known[..., None, :], log_k], dim=-2).logcumsumexp(-2)[..., 1:, :]
        log_q = log_q - finite(grouped(log_z, heads))
    scaled = log_q + grouped(sums.log_scale, heads)[..., None, :]
    top = top_of(scaled, -1)
    weights = (scaled - top[..., None]).exp()
    denominator = per_key_head(weights, sums.z[..., None])[..., 0]
    parts = [Reading(per_key_head(weights, sums.kv), denominator, denominator, top)]
    # Every query reads its own key, then, in blocks of 1, 2, 4 ... keys, every second block the one before it. So each
    # block of keys has a scale per feature, as sums have, and a later key can never push an earlier row to zero.
    own = log_q + grouped(log_k, heads)
    top = top_of(own, -1)
    weight = (own - top[..., None]).exp().sum(-1)
    parts.append(Reading(weight[..., None] * grouped(v, heads), weight, weight, top))
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
    log_scale = finite(key.detach().amax(-2, keepdim=True))
    scaled = query + log_scale
    top = finite(scaled.detach().amax(-1, keepdim=True))
    similarity = (scaled - top).exp() @ (key - log_scale).exp().mT
    denominator = rows(similarity.sum(-1, keepdim=True))[..., 0]
    return Reading(rows(similarity @ blocks(v, 0)), denominator, denominator, rows(top)[..., 0])
