"""Kernels of the gradient of causal attention: by queries, forward in time, and by keys and values, backward.

Both walk over chunks as ``causal_forward`` does and make the similarities anew. Backward in time the sums are over
queries: of a phi(q) g^T and b phi(q), with the logarithms of a row's features less its scale.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .causal_forward import constant_part, load_seen, load_state, scaled_keys
from .denominator import row_factors
from .device import centred, features, features_backward, finite, load_block, load_row, operand, product, store_block


@triton.jit
def pick(block, i, j):
    """Row j of a block, in float32."""
    return tl.sum(tl.where((i == j)[:, None], block.to(tl.float32), 0.0), 0)


@triton.jit
def exact_queries(log_q, log_k, v, ga, b, before, i, BC: tl.constexpr):
    """Gradient of the logarithms of a chunk's queries, key by key, added to ``before``."""
    for j in range(BC):
        pair = tl.where((i >= j)[:, None], log_q + pick(log_k, i, j)[None, :], -float("inf"))
        weight = tl.sum(ga * pick(v, i, j)[None, :], 1) + b
        before += weight[:, None] * tl.exp(pair)
    return before


@triton.jit
def exact_keys(log_q, log_k, v, ga, b, of_k, of_v, i, BC: tl.constexpr):
    """Gradients of the logarithms of a chunk's keys and of its values, query by query, added to ``of_k``, ``of_v``."""
    for j in range(BC):
        pair = tl.exp(tl.where((i <= j)[:, None], log_k + pick(log_q, i, j)[None, :], -float("inf")))
        g = pick(ga, i, j)
        of_k += (tl.sum(v.to(tl.float32) * g[None, :], 1) + tl.sum(tl.where(i == j, b, 0.0), 0))[:, None] * pair
        of_v += tl.sum(pair, 1)[:, None] * g[None, :]
    return of_k, of_v


@triton.jit
def causal_queries(
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
    grad,
    denominators,
    magnitudes,
    floor,
    last,
    rows,  # written: (a, b, a_last, b_last), pointers to (B H, N) float32, the last two None without a floor
    dq,
    H,
    Hk,
    N,
    span,
    M,
    D,
    E,
    UNIT: tl.constexpr,
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradient of q, and how that of out reaches numerators and denominators. Grid: spans, 1, B H."""
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
        g = load_block(grad, batch, head, tokens, live, e, E).to(tl.float32)
        magnitude = load_row(magnitudes, row, tokens, live, float("inf"))
        phi_q = features(q_block, f_q, key_head, d, D, m, M, True, FAMILY, MODE)
        phi_k = features(k_block, f_k, key_head, d, D, m, M, False, FAMILY, MODE)
        log_q, log_k = phi_q, phi_k
        before_kv, before_z, before_scale = sum_kv, sum_z, scale
        if FAMILY == 0:
            phi_k = tl.where(seen[:, None], phi_k, 0.0)
        else:
            log_q = log_q - magnitude[:, None]
            log_k = tl.where(seen[:, None], log_k, -float("inf"))
            phi_k, sum_kv, sum_z, scale, _ = scaled_keys(log_k, seen, sum_kv, sum_z, scale)
            spread = tl.max(tl.max(log_q + finite(scale)[None, :], 1), 0)
            phi_q = tl.exp(tl.minimum(log_q + finite(scale)[None, :], 60.0))
        if UNIT:
            a = tl.where(live & (magnitude == 0), 1.0, 0.0)
            b = tl.zeros_like(a)
        else:
            denominator = load_row(denominators, row, tokens, live, 0.0)
            of_out = tl.sum(g * load_block(out, batch, head, tokens, live, e, E).to(tl.float32), 1)
            if last is not None:
                n0, d0, _ = constant_part(phi_k, v_block, sum_kv, sum_z, tl.load(last + key_head), earlier, m, M, MODE)
                of_n0 = tl.sum(g * n0, 1)
                a, b, a_last, b_last = row_factors(of_out, of_n0, denominator, magnitude, d0, floor, True, FAMILY)
                tl.store(rows[2] + row + tokens, a_last, mask=live)
                tl.store(rows[3] + row + tokens, b_last, mask=live)
            else:
                a, b, a_last, b_last = row_factors(of_out, of_out, denominator, magnitude, of_out, floor, False, FAMILY)
        tl.store(rows[0] + row + tokens, a, mask=live)
        tl.store(rows[1] + row + tokens, b, mask=live)
        g = g * a[:, None]
        weights = tl.where(earlier, product(g, tl.trans(v_block), MODE) + b[:, None], 0.0)
        of_q = product(g, tl.trans(sum_kv), MODE) + b[:, None] * sum_z[None, :] + product(weights, phi_k, MODE)
        if FAMILY != 0:
            of_q = of_q * phi_q
            if spread > 60.0:
                of_q = product(g, tl.trans(before_kv), MODE) + b[:, None] * before_z[None, :]
                of_q = of_q * tl.exp(log_q + before_scale[None, :])
                of_q = exact_queries(log_q, log_k, v_block, g, b, of_q, i, BC)
        dx = features_backward(q_block, phi_q, of_q, f_q, key_head, d, D, m, M, FAMILY, MODE)
        store_block(dq, dx, batch, head, tokens, live, d, D, MODE)
        sum_kv += product(tl.trans(operand(phi_k, MODE)), v_block, MODE)
        sum_z += tl.sum(phi_k, 0)


@triton.jit
def causal_keys(
    q,
    k,
    v,
    f_q,
    f_k,
    mask,
    kv,  # (B H, spans, M, E): sums over the queries of everything after a span
    z,
    log_scale,
    grad,
    magnitudes,
    last,
    rows,
    dk,  # (B, H, N, D): one per query head
    dv,
    H,
    Hk,
    N,
    span,
    M,
    D,
    E,
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradients of k and v, as far as they come from one query head. Grid: spans, 1, B H."""
    batch = tl.program_id(2).to(tl.int64) // H
    head = tl.program_id(2).to(tl.int64) % H
    key_head = head // (H // Hk)
    row = (batch * H + head) * N
    i = tl.arange(0, BC)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    earlier = i[:, None] >= i[None, :]
    of_last = tl.where(m == M - 1, 1.0, 0.0)
    place = ((batch * H + head) * tl.num_programs(0) + tl.program_id(0)) * M
    sum_kv, sum_z, scale = load_state(kv, z, log_scale, place, m, M, e, E, FAMILY)
    start = tl.program_id(0).to(tl.int64) * span
    stop = tl.minimum(start + span, N)
    chunks = (stop - start + BC - 1) // BC
    for step in range(chunks):
        tokens = start + (chunks - 1 - step) * BC + i.to(tl.int64)
        live = tokens < stop
        seen = load_seen(mask, batch, tokens, live)
        q_block = centred(load_block(q, batch, head, tokens, live, d, D), f_q, key_head, d, D)
        k_block = centred(load_block(k, batch, key_head, tokens, live, d, D), f_k, key_head, d, D)
        v_block = load_block(v, batch, key_head, tokens, live, e, E)
        g = load_block(grad, batch, head, tokens, live, e, E).to(tl.float32)
        a = load_row(rows[0], row, tokens, live, 0.0)
        b = load_row(rows[1], row, tokens, live, 0.0)
        phi_q = features(q_block, f_q, key_head, d, D, m, M, False, FAMILY, MODE)
        phi_k = features(k_block, f_k, key_head, d, D, m, M, True, FAMILY, MODE)
        log_q, log_k = phi_q, phi_k
        before_kv, before_z, before_scale = sum_kv, sum_z, scale
        if FAMILY == 0:
            phi_q = tl.where(live[:, None], phi_q, 0.0)
            phi_k = tl.where(seen[:, None], phi_k, 0.0)
        else:
            log_q = log_q - load_row(magnitudes, row, tokens, live, float("inf"))[:, None]
            log_k = tl.where(seen[:, None], log_k, -float("inf"))
            phi_q, sum_kv, sum_z, scale, _ = scaled_keys(log_q, live, sum_kv, sum_z, scale)
            above = tl.where(scale > -float("inf"), scale, -1e30)
            spread = tl.max(tl.max(log_k + above[None, :], 1), 0)
            phi_k = tl.exp(tl.minimum(log_k + above[None, :], 60.0))
        ga = g * a[:, None]
        similarity = tl.where(earlier, product(phi_q, tl.trans(phi_k), MODE), 0.0)
        weights = tl.where(earlier, product(ga, tl.trans(v_block), MODE) + b[:, None], 0.0)
        of_k = product(tl.trans(weights), phi_q, MODE) + product(v_block, tl.trans(sum_kv), MODE) + sum_z[None, :]
        of_v = product(tl.trans(similarity), ga, MODE) + product(phi_k, sum_kv, MODE)
        phi_b = phi_q * b[:, None]
        phi_a = phi_q * a[:, None]
        if last is not None:
            constant = tl.load(last + key_head)
            a_last = load_row(rows[2], row, tokens, live, 0.0)
            b_last = load_row(rows[3], row, tokens, live, 0.0)
            of_keys = constant * tl.sum(phi_k * of_last[None, :], 1)
            of_v += product(tl.trans(tl.where(earlier, a_last[:, None] * of_keys[None, :], 0.0)), g, MODE)
            lasting = product(g * a_last[:, None], tl.trans(v_block), MODE) + b_last[:, None]
            of_k += (constant * tl.sum(tl.where(earlier, lasting, 0.0), 0))[:, None] * of_last[None, :]
            phi_a += (phi_q * a_last[:, None]) * of_last[None, :]
            phi_b += (phi_q * b_last[:, None]) * of_last[None, :]
        if FAMILY != 0:
            of_k = of_k * phi_k
            if spread > 60.0:
                phi = tl.exp(log_k + before_scale[None, :])
                of_k = phi * (product(v_block, tl.trans(before_kv), MODE) + before_z[None, :])
                of_v = product(phi, before_kv, MODE)
                of_k, of_v = exact_keys(log_q, log_k, v_block, ga, b, of_k, of_v, i, BC)
        dx = features_backward(k_block, phi_k, of_k, f_k, key_head, d, D, m, M, FAMILY, MODE)
        store_block(dk, dx, batch, head, tokens, live, d, D, MODE)
        store_block(dv, of_v, batch, head, tokens, live, e, E, MODE)
        sum_kv += product(tl.trans(phi_a), g, MODE)
        sum_z += tl.sum(phi_b, 0)
