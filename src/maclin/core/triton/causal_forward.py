"""Kernel of causal attention: exact within a chunk of tokens, everything before it read from the sums.

Logarithms. Within a chunk all keys share one scale per feature, the largest logarithm so far. A key later in the chunk
that is larger by more than exp(60) could push earlier rows out of float32; such a chunk, which is told by its first
row, is made key by key instead, each row under its own scale. It is slow and never wrong.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .denominator import guarded, keep_floor
from .device import centred, features, finite, load_block, operand, product, store_block


@triton.jit
def load_state(kv, z, log_scale, place, m, M, e, E, FAMILY: tl.constexpr):
    """Sums kv (BM, BE), z (BM,) and their scale, of contiguous (..., M, E) and (..., M)."""
    sum_kv = tl.load(kv + (place + m)[:, None] * E + e[None, :], mask=(m < M)[:, None] & (e < E)[None, :], other=0.0)
    sum_z = tl.load(z + place + m, mask=m < M, other=0.0)
    if FAMILY == 0:
        return sum_kv, sum_z, sum_z
    else:
        return sum_kv, sum_z, tl.load(log_scale + place + m, mask=m < M, other=-float("inf"))


@triton.jit
def load_seen(mask, batch, tokens, live):
    """Which tokens of a block are keys that may be attended to."""
    if mask is not None:
        return live & (tl.load(mask[0] + batch * mask[1] + tokens * mask[2], mask=live, other=0) != 0)
    else:
        return live


@triton.jit
def scaled_keys(log_k, seen, kv, z, scale):
    """Features of a chunk under a scale that they share with the sums before it; ``seen``: tokens that count.

    Returns the features, the sums and scale under it, and how far the first row may lie below it.
    """
    log_k = tl.where(seen[:, None], log_k, -float("inf"))
    larger = tl.maximum(scale, tl.max(log_k, 0))
    shared = finite(larger)
    fade = tl.exp(scale - shared)
    first = tl.min(tl.where(seen[:, None], log_k, float("inf")), 0)
    first = tl.where(scale > -float("inf"), scale, first)
    spread = tl.max(tl.where(larger > -float("inf"), shared - first, 0.0), 0)
    return tl.exp(log_k - shared[None, :]), kv * fade[:, None], z * fade, larger, spread


@triton.jit
def exact_rows(log_q, log_k, v, kv, z, scale, i, BC: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr):
    """Numerator, denominator and scale of each row of a chunk, key by key; what is not seen is minus infinity."""
    top = tl.max(log_q + scale[None, :], 1)
    if UNIT:
        top = tl.zeros_like(top)
    weights = tl.exp(log_q + scale[None, :] - finite(top)[:, None])
    numerator = product(weights, kv, MODE)
    denominator = tl.sum(weights * z[None, :], 1)
    for j in range(BC):
        key = tl.sum(tl.where((i == j)[:, None], log_k, 0.0), 0)
        value = tl.sum(tl.where((i == j)[:, None], v.to(tl.float32), 0.0), 0)
        pair = tl.where((i >= j)[:, None], log_q + key[None, :], -float("inf"))
        higher = top
        if not UNIT:
            higher = tl.maximum(top, tl.max(pair, 1))
        fade = tl.exp(top - finite(higher))
        weight = tl.sum(tl.exp(pair - finite(higher)[:, None]), 1)
        numerator = numerator * fade[:, None] + weight[:, None] * value[None, :]
        denominator = denominator * fade + weight
        top = higher
    return numerator, denominator, top


@triton.jit
def constant_part(phi_k, v, kv, z, constant, earlier, m, M, MODE: tl.constexpr):
    """What the last feature alone gives numerator and denominator of each row, and its values for the keys."""
    of_last = tl.where(m == M - 1, 1.0, 0.0)
    of_keys = constant * tl.sum(phi_k * of_last[None, :], 1)
    weights = tl.where(earlier, of_keys[None, :], 0.0)
    n0 = constant * tl.sum(kv * of_last[:, None], 0)[None, :] + product(weights, v, MODE)
    d0 = constant * tl.sum(z * of_last, 0) + tl.sum(weights, 1)
    return n0, d0, of_keys


@triton.jit
def causal_forward(
    q,
    k,
    v,
    f_q,
    f_k,
    mask,
    kv,  # (B Hk, spans, M, E): sums of everything before a span
    z,
    log_scale,
    out,
    denominators,
    magnitudes,  # in the log domain the scale of the row, infinite where it attends to nothing
    floor,
    last,
    H,
    Hk,
    N,
    span,
    M,
    D,
    E,
    UNIT: tl.constexpr,  # rows are normalised already: the denominator is 1
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Out of a span of tokens, chunk by chunk, the sums carried along. Grid: spans, 1, B H."""
    batch = tl.program_id(2).to(tl.int64) // H
    head = tl.program_id(2).to(tl.int64) % H
    key_head = head // (H // Hk)
    row = (batch * H + head) * N
    i = tl.arange(0, BC)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    earlier = i[:, None] >= i[None, :]
    place = ((batch * Hk + key_head) * tl.num_programs(0) + tl.program_id(0)) * M
    sum_kv, sum_z, scale = load_state(kv, z, log_scale, place, m, M, e, E, FAMILY)
    start = tl.program_id(0).to(tl.int64) * span
    stop = tl.minimum(start + span, N)
    for first in range(start, stop, BC):
        tokens = first + i.to(tl.int64)
        live = tokens < stop
        seen = load_seen(mask, batch, tokens, live)
        q_block = centred(load_block(q, batch, head, tokens, live, d, D), f_q, key_head, d, D)
        k_block = centred(load_block(k, batch, key_head, tokens, live, d, D), f_k, key_head, d, D)
        v_block = load_block(v, batch, key_head, tokens, live, e, E)
        log_q = features(q_block, f_q, key_head, d, D, m, M, False, FAMILY, MODE)
        log_k = features(k_block, f_k, key_head, d, D, m, M, False, FAMILY, MODE)
        before_kv, before_z, before_scale = sum_kv, sum_z, scale
        if FAMILY == 0:
            phi_q = operand(log_q, MODE).to(tl.float32)
            phi_k = tl.where(seen[:, None], log_k, 0.0)
        else:
            log_q = tl.where(live[:, None], log_q, -float("inf"))
            log_k = tl.where(seen[:, None], log_k, -float("inf"))
            phi_k, sum_kv, sum_z, scale, spread = scaled_keys(log_k, seen, sum_kv, sum_z, scale)
            top = tl.max(log_q + finite(scale)[None, :], 1)
            if UNIT:
                spread = tl.max(top, 0)
                top = tl.zeros_like(top)
            log_phi = tl.minimum(log_q + finite(scale)[None, :] - finite(top)[:, None], 60.0)
            phi_q = operand(tl.exp(log_phi), MODE).to(tl.float32)
        phi_k = operand(phi_k, MODE).to(tl.float32)
        similarity = tl.where(earlier, product(phi_q, tl.trans(phi_k), MODE), 0.0)
        similarity = operand(similarity, MODE).to(tl.float32)
        numerator = product(phi_q, sum_kv, MODE) + product(similarity, v_block, MODE)
        denominator = tl.sum(phi_q * sum_z[None, :], 1) + tl.sum(similarity, 1)
        if FAMILY == 0:
            largest = tl.maximum(tl.max(tl.abs(sum_z), 0), 1.1754943508222875e-38)  # z may be too large to be squared
            share = sum_z / largest
            magnitude = tl.sqrt(tl.sum(phi_q * phi_q, 1)) * (tl.sqrt(tl.sum(share * share, 0)) * largest)
            magnitude += tl.sum(tl.abs(similarity), 1)
        else:
            if spread > 60.0:
                numerator, denominator, top = exact_rows(
                    log_q, log_k, v_block, before_kv, before_z, before_scale, i, BC, UNIT, MODE
                )
            magnitude = tl.where(denominator == 0, float("inf"), top)
        tl.store(denominators + row + tokens, denominator, mask=live)
        tl.store(magnitudes + row + tokens, magnitude, mask=live)
        used = denominator
        if last is not None:
            n0, d0, _ = constant_part(phi_k, v_block, sum_kv, sum_z, tl.load(last + key_head), earlier, m, M, MODE)
            numerator, used = keep_floor(numerator, used, n0, d0, floor)
        if not UNIT:
            numerator = numerator / guarded(used, magnitude, FAMILY)[:, None]
        store_block(out, numerator, batch, head, tokens, live, e, E, MODE)
        sum_kv += product(tl.trans(phi_k), v_block, MODE)
        sum_z += tl.sum(phi_k, 0)
