"""Kernels of the two phases without an order in time: sums over keys, a reading by queries, gradients of both.

The gradient of a reading is a sum over queries of phi(q) g^T, and that of a sum is a reading of the gradient of the
sums; so three kernels do: ``accumulate``, ``read`` and ``gradient``, each by blocks of tokens and of features.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .denominator import guarded, keep_floor, row_factors
from .device import centred, features, features_backward, finite, load_block, load_row, operand, product, store_block


@triton.jit
def accumulate(
    x,
    v,
    f,
    mask,  # (pointer, strides of batch and token) of a key mask, or None
    rows,  # five pointers to (B H, N) float32, each may be None: a, b, a_last, b_last, and what logarithms lose
    shift,  # (B, Hk, M) added to logarithms, or None: then the running maximum is subtracted and returned in ``top``
    kv,
    z,
    top,
    H,
    Hk,
    N,
    span,
    M,
    D,
    E,
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Sum over tokens of a phi(x) v^T and b phi(x), for one block of features and one span of tokens.

    Grid: blocks of features, spans, B H. Writes kv (B H, spans, M, E), z and top (B H, spans, M).
    """
    batch = tl.program_id(2).to(tl.int64) // H
    head = tl.program_id(2).to(tl.int64) % H
    key_head = head // (H // Hk)
    row = (batch * H + head) * N
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    start = tl.program_id(1).to(tl.int64) * span
    stop = tl.minimum(start + span, N)
    sum_kv = tl.zeros((BM, BE), tl.float32)
    sum_z = tl.zeros((BM,), tl.float32)
    largest = tl.full((BM,), -float("inf"), tl.float32)
    for first in range(start, stop, BT):
        tokens = first + tl.arange(0, BT).to(tl.int64)
        live = tokens < stop
        x_block = centred(load_block(x, batch, head, tokens, live, d, D), f, key_head, d, D)
        v_block = load_block(v, batch, head, tokens, live, e, E)
        if mask is not None:
            live = live & (tl.load(mask[0] + batch * mask[1] + tokens * mask[2], mask=live, other=0) != 0)
        phi = features(x_block, f, key_head, d, D, m, M, False, FAMILY, MODE)
        if FAMILY == 0:
            phi = tl.where(live[:, None], phi, 0.0)
        else:
            if rows[4] is not None:
                phi -= load_row(rows[4], row, tokens, live, 0.0)[:, None]
            phi = tl.where(live[:, None], phi, -float("inf"))
            if shift is None:
                larger = tl.maximum(largest, tl.max(phi, 0))
                fade = tl.exp(largest - finite(larger))
                sum_kv = sum_kv * fade[:, None]
                sum_z = sum_z * fade
                largest = larger
                phi = tl.exp(phi - finite(larger)[None, :])
            else:
                scale = tl.load(shift + (batch * Hk + key_head) * M + m, mask=m < M, other=0.0)
                phi = tl.exp(phi + scale[None, :])
        phi = operand(phi, MODE).to(tl.float32)
        if rows[0] is None:
            sum_z += tl.sum(phi, 0)
        else:
            a = load_row(rows[0], row, tokens, live, 0.0)[:, None]
            b = load_row(rows[1], row, tokens, live, 0.0)[:, None]
            if rows[2] is not None:
                a += tl.where(m == M - 1, 1.0, 0.0)[None, :] * load_row(rows[2], row, tokens, live, 0.0)[:, None]
                b += tl.where(m == M - 1, 1.0, 0.0)[None, :] * load_row(rows[3], row, tokens, live, 0.0)[:, None]
            sum_z += tl.sum(phi * b, 0)
            phi = phi * a
        sum_kv += product(tl.trans(phi), v_block, MODE)
    place = ((batch * H + head) * tl.num_programs(1) + tl.program_id(1)) * M + m
    tl.store(kv + place[:, None] * E + e[None, :], sum_kv, mask=(m < M)[:, None] & (e < E)[None, :])
    tl.store(z + place, sum_z, mask=m < M)
    if top is not None:
        tl.store(top + place, largest, mask=m < M)


@triton.jit
def read(
    q,
    f,
    kv,  # (B, Hk, M, E), as are z and log_scale (B, Hk, M) contiguous, in float32
    z,
    log_scale,  # None outside the log domain
    z_norm,  # (B, Hk): |z|; None in the log domain
    out,
    denominators,  # (B H, N): of q, not yet guarded
    magnitudes,  # (B H, N): its bound; in the log domain the scale of the row
    floor,
    last,  # the coefficient of the last feature of each key head, where there is a floor, or None
    H,
    Hk,
    N,
    M,
    D,
    E,
    FINISH: tl.constexpr,
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """What a block of queries reads from the sums; with FINISH divided by the guarded denominator.

    Grid: blocks of tokens, 1, B H.
    """
    batch = tl.program_id(2).to(tl.int64) // H
    head = tl.program_id(2).to(tl.int64) % H
    key_head = head // (H // Hk)
    sums = (batch * Hk + key_head) * M
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = tokens < N
    q_block = centred(load_block(q, batch, head, tokens, live, d, D), f, key_head, d, D)
    numerator = tl.zeros((BT, BE), tl.float32)
    denominator = tl.zeros((BT,), tl.float32)
    size = tl.zeros((BT,), tl.float32)
    top = tl.full((BT,), -float("inf"), tl.float32)
    for first in range(0, M, BM):
        m = first + tl.arange(0, BM)
        z_block = tl.load(z + sums + m, mask=m < M, other=0.0)
        kv_block = tl.load(
            kv + (sums + m)[:, None] * E + e[None, :], mask=(m < M)[:, None] & (e < E)[None, :], other=0.0
        )
        phi = features(q_block, f, key_head, d, D, m, M, False, FAMILY, MODE)
        if FAMILY != 0:
            phi += tl.load(log_scale + sums + m, mask=m < M, other=-float("inf"))[None, :]
            higher = tl.maximum(top, tl.max(phi, 1))
            fade = tl.exp(top - finite(higher))
            numerator = numerator * fade[:, None]
            denominator = denominator * fade
            top = higher
            phi = tl.exp(phi - finite(higher)[:, None])
        phi = operand(phi, MODE).to(tl.float32)
        numerator += product(phi, kv_block, MODE)
        denominator += tl.sum(phi * z_block[None, :], 1)
        size += tl.sum(phi * phi, 1)
    magnitude = finite(top)
    if FAMILY == 0:
        magnitude = tl.sqrt(size) * tl.load(z_norm + batch * Hk + key_head)
    row = (batch * H + head) * N
    tl.store(denominators + row + tokens, denominator, mask=live)
    tl.store(magnitudes + row + tokens, magnitude, mask=live)
    if FINISH:
        if last is not None:
            constant = tl.load(last + key_head)
            d0 = constant * tl.load(z + sums + M - 1)
            n0 = constant * tl.load(kv + (sums + M - 1) * E + e, mask=e < E, other=0.0)
            numerator, denominator = keep_floor(numerator, denominator, n0[None, :], d0, floor)
        numerator = numerator / guarded(denominator, magnitude, FAMILY)[:, None]
    store_block(out, numerator, batch, head, tokens, live, e, E, MODE)


@triton.jit
def gradient(
    x,
    y,  # values, or the gradient of out
    f,
    mask,
    rows,  # (a, b, scale of the row), pointers to (B H, N) float32 or None
    shift,  # (B, Hk, M), added to logarithms
    kv,  # (B, Hk, M, E): what y is multiplied with
    z,
    dx,
    dy,  # None where not wanted
    H,
    Hk,
    N,
    M,
    D,
    E,
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradient of sum_t phi(x_t)^T (a_t kv y_t + b_t z) by x, and, where wanted, by y.

    Grid: blocks of tokens, 1, B H.
    """
    batch = tl.program_id(2).to(tl.int64) // H
    head = tl.program_id(2).to(tl.int64) % H
    key_head = head // (H // Hk)
    sums = (batch * Hk + key_head) * M
    row = (batch * H + head) * N
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = tokens < N
    seen = live
    if mask is not None:
        seen = live & (tl.load(mask[0] + batch * mask[1] + tokens * mask[2], mask=live, other=0) != 0)
    x_block = centred(load_block(x, batch, head, tokens, live, d, D), f, key_head, d, D)
    y_block = load_block(y, batch, head, tokens, live, e, E)
    sum_x = tl.zeros((BT, BD), tl.float32)
    sum_y = tl.zeros((BT, BE), tl.float32)
    for first in range(0, M, BM):
        m = first + tl.arange(0, BM)
        z_block = tl.load(z + sums + m, mask=m < M, other=0.0)
        kv_block = tl.load(
            kv + (sums + m)[:, None] * E + e[None, :], mask=(m < M)[:, None] & (e < E)[None, :], other=0.0
        )
        phi = features(x_block, f, key_head, d, D, m, M, True, FAMILY, MODE)
        if FAMILY != 0:
            phi += tl.load(shift + sums + m, mask=m < M, other=0.0)[None, :]
            if rows[2] is not None:
                phi -= load_row(rows[2], row, tokens, live, 0.0)[:, None]
            phi = tl.exp(phi)
        phi = tl.where(seen[:, None], phi, 0.0)
        grad = product(y_block, tl.trans(kv_block), MODE)
        if rows[0] is not None:
            grad = grad * load_row(rows[0], row, tokens, live, 0.0)[:, None]
            grad += load_row(rows[1], row, tokens, live, 0.0)[:, None] * z_block[None, :]
        else:
            grad += z_block[None, :]
        if dy is not None:
            sum_y += product(phi, kv_block, MODE)
        if FAMILY != 0:
            grad = grad * phi
        sum_x += features_backward(x_block, phi, grad, f, key_head, d, D, m, M, FAMILY, MODE)
    store_block(dx, sum_x, batch, head, tokens, live, d, D, MODE)
    if dy is not None:
        store_block(dy, sum_y, batch, head, tokens, live, e, E, MODE)


@triton.jit
def factors(
    out,
    grad,
    denominators,
    magnitudes,
    kv,
    z,
    floor,
    last,
    rows,  # (a, b, a_last, b_last), pointers to (B H, N) float32, the last two None without a floor
    H,
    Hk,
    N,
    M,
    E,
    FAMILY: tl.constexpr,
    MODE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Factors with which the gradient of out reaches numerator and denominator of each row.

    Grid: blocks of tokens, 1, B H.
    """
    batch = tl.program_id(2).to(tl.int64) // H
    head = tl.program_id(2).to(tl.int64) % H
    key_head = head // (H // Hk)
    row = (batch * H + head) * N
    e = tl.arange(0, BE)
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = tokens < N
    g = load_block(grad, batch, head, tokens, live, e, E).to(tl.float32)
    of_out = tl.sum(g * load_block(out, batch, head, tokens, live, e, E).to(tl.float32), 1)
    denominator = load_row(denominators, row, tokens, live, 1.0)
    magnitude = load_row(magnitudes, row, tokens, live, 1.0)
    if last is not None:
        sums = (batch * Hk + key_head) * M + M - 1
        constant = tl.load(last + key_head)
        n0 = constant * tl.load(kv + sums * E + e, mask=e < E, other=0.0)
        d0 = tl.zeros((BT,), tl.float32) + constant * tl.load(z + sums)
        of_n0 = tl.sum(g * n0[None, :], 1)
        a, b, a_last, b_last = row_factors(of_out, of_n0, denominator, magnitude, d0, floor, True, FAMILY)
        tl.store(rows[2] + row + tokens, a_last, mask=live)
        tl.store(rows[3] + row + tokens, b_last, mask=live)
    else:
        a, b, a_last, b_last = row_factors(of_out, of_out, denominator, magnitude, of_out, floor, False, FAMILY)
    tl.store(rows[0] + row + tokens, a, mask=live)
    tl.store(rows[1] + row + tokens, b, mask=live)
