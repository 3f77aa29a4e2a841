"""The two phases without an order in time, for any feature map: sums, a reading, and their gradients.

Sums are what ``core.contract.Sums`` holds: kv (B, Hk, M, Dv) and z (B, Hk, M), both divided by exp(log_scale)
(B, Hk, M), which is empty outside the log domain, and count (B,). Scales cancel in out, so no gradient is theirs.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import bidirectional
from .device import PRODUCTS
from .launch import (
    Blocks,
    FeatureMap,
    candidates,
    cdiv,
    first_that_fits,
    mask_view,
    options,
    padded,
    shape_of,
    spans,
    start_kernel,
    view,
)

Sums = tuple[Tensor, Tensor, Tensor, Tensor]


class Reading(NamedTuple):
    """What queries read: out (B, H, N, Dv), and of each row (B, H, N) the denominator and its bound or scale.

    ``out`` is the quotient in the dtype that was asked for, or, unfinished, the numerator in float32. ``magnitude``
    bounds abs(denominator); for positive features it is the logarithm by which numerator and denominator are scaled.
    """

    out: Tensor
    denominator: Tensor
    magnitude: Tensor


class Rows(NamedTuple):
    """Factors of each row (B, H, N) of a gradient, and what the logarithms of its features lose; see ``device``."""

    a: Tensor | None = None
    b: Tensor | None = None
    a_last: Tensor | None = None
    b_last: Tensor | None = None
    lost: Tensor | None = None


def accumulate(
    f: FeatureMap,
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None = None,  # (B, S) bool
    sums: Sums | None = None,
    blocks: Blocks | None = None,
) -> Sums:
    """Sums over all keys, and over those of ``sums``."""
    kv, z, top = span_sums(f, k, v, key_mask, blocks=blocks)
    count = k.new_full((k.shape[0],), k.shape[2], dtype=torch.float32) if key_mask is None else key_mask.sum(-1).float()
    if sums is not None:
        kv, z = torch.cat([sums[0].float()[:, :, None], kv], 2), torch.cat([sums[1].float()[:, :, None], z], 2)
        top = torch.cat([sums[2].float()[:, :, None], top], 2) if f.logarithms else top
        count = count + sums[3].float()
    return *merged(kv, z, top), count


def merged(kv: Tensor, z: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of spans (B, Hk, spans, ...) as those of the whole, always in the same order."""
    if top.shape[-1] == 0:
        return kv.sum(2), z.sum(2), top[:, :, 0]
    largest = top.amax(2)
    share = (top - largest.masked_fill(largest == -torch.inf, 0.0)[:, :, None]).exp()
    return (kv * share[..., None]).sum(2), (z * share).sum(2), largest


def rescaled(grads: tuple[Tensor, Tensor], log_scale: Tensor, new_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of kv and z under ``new_scale`` as those under ``log_scale``; both empty outside the log domain."""
    if log_scale.shape[-1] == 0:
        return grads
    share = (log_scale.float() - new_scale.masked_fill(new_scale == -torch.inf, 0.0)).exp()
    return grads[0] * share[..., None], grads[1] * share


def span_sums(
    f: FeatureMap,
    x: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    rows: Rows | None = None,
    shift: Tensor | None = None,
    key_heads: int | None = None,
    span: int | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a phi(x) v^T and b phi(x) over spans of tokens, one set per head of x.

    Returns kv (B, H, spans, M, Dv), z and scale (B, H, spans, M), the scale empty outside the log domain.
    """
    rows = rows or Rows()
    shape = shape_of(f, x, v, key_heads or x.shape[1])
    m = shape.features

    def run(sizes: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        number, length = spans(shape, sizes) if span is None else (max(1, cdiv(shape.length, span)), span)
        new = x.new_empty(0, dtype=torch.float32)
        kv = new.new_empty(shape.batch, shape.heads, number, m, shape.value_width)
        z = new.new_empty(shape.batch, shape.heads, number, m)
        online = f.logarithms and shift is None
        top = torch.empty_like(z) if online else new.new_empty(shape.batch, shape.heads, number, 0)
        constants = options(f, shape, sizes)
        if kv.numel():
            start_kernel(
                bidirectional.accumulate,
                (cdiv(m, constants["BM"]), number, shape.batch * shape.heads),
                view(x),
                view(v),
                f.arguments(),
                mask_view(key_mask),
                tuple(rows),
                shift,
                kv,
                z,
                top if online else None,
                shape.heads,
                shape.key_heads,
                shape.length,
                length,
                *shape.sizes(),
                **constants,
            )
        return kv, z, top

    return first_that_fits("accumulate", shape, candidates(shape, blocks), run)


def read(
    f: FeatureMap,
    q: Tensor,  # (B, H, N, D)
    sums: Sums,
    dtype: torch.dtype,
    floor: float = 0.0,
    finish: bool = True,
    blocks: Blocks | None = None,
) -> Reading:
    """What queries read from the sums; divided by the guarded denominator unless ``finish`` is off."""
    kv, z, log_scale = (x.float().contiguous() for x in sums[:3])
    shape = shape_of(f, q, q.new_empty(0, kv.shape[-1], dtype=dtype), kv.shape[1])
    out = q.new_empty(*q.shape[:-1], shape.value_width, dtype=dtype if finish else torch.float32)
    denominator, magnitude = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))

    def run(sizes: Blocks) -> Reading:
        if out.numel():
            start_kernel(
                bidirectional.read,
                (cdiv(shape.length, sizes.tokens), 1, shape.batch * shape.heads),
                view(q),
                f.arguments(),
                kv,
                z,
                log_scale if f.logarithms else None,
                norm(z) if f.family == PRODUCTS else None,
                view(out),
                denominator,
                magnitude,
                floor,
                f.last if floor else None,
                shape.heads,
                shape.key_heads,
                shape.length,
                *shape.sizes(),
                FINISH=finish,
                **options(f, shape, sizes),
            )
        return Reading(out, denominator, magnitude)

    return first_that_fits("read", shape, candidates(shape, blocks), run)


def norm(z: Tensor) -> Tensor:
    """|z| over the last dimension; weights of keys make z too large to be squared."""
    largest = z.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return torch.linalg.vector_norm(z / largest, dim=-1) * largest[..., 0]


def read_backward(
    f: FeatureMap,
    q: Tensor,
    sums: Sums,
    reading: Reading,
    grad: Tensor,  # (B, H, N, Dv), of out
    floor: float = 0.0,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a finished reading: of q, kv and z."""
    kv, z, log_scale = (x.float().contiguous() for x in sums[:3])
    shape = shape_of(f, q, grad, kv.shape[1])
    rows = row_factors(f, kv, z, reading, grad, floor, blocks)
    rows = rows._replace(lost=reading.magnitude if f.logarithms else None)
    shift = log_scale if f.logarithms else None
    dq = gradient(f, q, grad, None, rows, shift, kv, z, blocks=blocks)[0]
    dkv, dz, _ = span_sums(f, q, grad, None, rows, shift, shape.key_heads, blocks=blocks)
    group = (shape.key_heads, shape.heads // shape.key_heads)
    return dq, dkv.unflatten(1, group).sum((2, 3)), dz.unflatten(1, group).sum((2, 3))


def row_factors(
    f: FeatureMap, kv: Tensor, z: Tensor, reading: Reading, grad: Tensor, floor: float, blocks: Blocks | None
) -> Rows:
    """How the gradient of each row of out reaches numerator and denominator."""
    shape = shape_of(f, grad, grad, kv.shape[1])
    rows = [torch.empty_like(reading.denominator) for _ in range(4 if floor else 2)]
    tokens = 64 if blocks is None else blocks.tokens
    if grad.numel():
        start_kernel(
            bidirectional.factors,
            (cdiv(shape.length, tokens), 1, shape.batch * shape.heads),
            view(reading.out),
            view(grad),
            reading.denominator,
            reading.magnitude,
            kv,
            z,
            floor,
            f.last if floor else None,
            (*rows, None, None)[:4],
            shape.heads,
            shape.key_heads,
            shape.length,
            shape.features,
            shape.value_width,
            FAMILY=f.family,
            MODE=shape.mode,
            BT=tokens,
            BE=padded(shape.value_width),
        )
    return Rows(*rows)


def accumulate_backward(
    f: FeatureMap,
    k: Tensor,
    v: Tensor,
    log_scale: Tensor,  # of the sums
    dkv: Tensor,  # (B, Hk, M, Dv)
    dz: Tensor,  # (B, Hk, M)
    key_mask: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sums: of k and v."""
    shift = -log_scale.float() if f.logarithms else None
    dk, dv = gradient(f, k, v, key_mask, Rows(), shift, dkv, dz, True, blocks)
    assert dv is not None
    return dk, dv


def gradient(
    f: FeatureMap,
    x: Tensor,
    y: Tensor,
    key_mask: Tensor | None,
    rows: Rows,
    shift: Tensor | None,
    kv: Tensor,
    z: Tensor,
    of_y: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of sum_t phi(x_t)^T (a_t kv y_t + b_t z) by x, and, where wanted, by y, in the dtypes of these."""
    shape = shape_of(f, x, y, kv.shape[1])
    dx, dy = torch.empty_like(x), torch.empty_like(y) if of_y else None
    kv, z = kv.float().contiguous(), z.float().contiguous()
    shift = None if shift is None else shift.contiguous()

    def run(sizes: Blocks) -> tuple[Tensor, Tensor | None]:
        if x.numel():
            start_kernel(
                bidirectional.gradient,
                (cdiv(shape.length, sizes.tokens), 1, shape.batch * shape.heads),
                view(x),
                view(y),
                f.arguments(),
                mask_view(key_mask),
                (rows.a, rows.b, rows.lost),
                shift,
                kv,
                z,
                view(dx),
                None if dy is None else view(dy),
                shape.heads,
                shape.key_heads,
                shape.length,
                *shape.sizes(),
                **options(f, shape, sizes),
            )
        return dx, dy

    return first_that_fits("gradient", shape, candidates(shape, blocks), run)
