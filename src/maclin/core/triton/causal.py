"""Causal attention for any feature map: sums of spans side by side, a running total of them, then each span by itself.

Spans are long enough that their sums, (B, Hk, spans, M, Dv), stay small beside q, k and v.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import NoKernelError
from .causal_backward import causal_keys, causal_queries
from .causal_forward import causal_forward
from .contraction import Reading, Rows, Sums, accumulate, accumulate_backward, merged, rescaled, span_sums
from .launch import (
    Blocks,
    FeatureMap,
    Shape,
    cdiv,
    first_that_fits,
    mask_view,
    options,
    padded,
    shape_of,
    start_kernel,
    view,
)

_MOST_STATE = 1 << 14  # numbers of kv that a program keeps in registers
_PROGRAMS = 512
_MOST_SPANS = 64  # of a head: their running total takes the square of it
_LEAST_CHUNKS = 8  # of a span, so that its sums are few beside its tokens

Gradients = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]


def causal(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,  # (B, H, N, D)
    k: Tensor,  # (B, Hk, S, D), N <= S, the last query aligned with the last key
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None = None,
    sums: Sums | None = None,
    floor: float = 0.0,
    unit: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Reading, Sums]:
    """What queries read of all keys up to their own, and the sums of all keys; ``unit``: the denominator is 1."""
    prefix = k.shape[2] - q.shape[2]
    if prefix:
        head = None if key_mask is None else key_mask[:, :prefix]
        sums = accumulate(f_k, k[:, :, :prefix], v[:, :, :prefix], head, sums, blocks)
        k, v = k[:, :, prefix:], v[:, :, prefix:]
        key_mask = None if key_mask is None else key_mask[:, prefix:]
    shape = causal_shape(f_k, q, v)
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    denominator, magnitude = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))

    def run(sizes: Blocks) -> tuple[Reading, Sums]:
        span = span_of(shape, sizes)
        before, total = states(f_k, k, v, key_mask, sums, span, blocks)
        if out.numel():
            start_kernel(
                causal_forward,
                (before[0].shape[2], 1, shape.batch * shape.heads),
                view(q),
                view(k),
                view(v),
                f_q.arguments(),
                f_k.arguments(),
                mask_view(key_mask),
                *before,
                view(out),
                denominator,
                magnitude,
                floor,
                f_q.last if floor else None,
                *sizes_of(shape, span),
                UNIT=unit,
                **constants(f_k, shape, sizes),
            )
        return Reading(out, denominator, magnitude), total

    return first_that_fits("causal", shape, causal_candidates(shape, blocks), run)


def causal_backward(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    grad: Tensor,  # (B, H, N, Dv), of out
    key_mask: Tensor | None = None,
    sums: Sums | None = None,  # what ``causal`` started from
    grad_sums: tuple[Tensor, Tensor] | None = None,  # of kv and z that ``causal`` returned
    log_scale: Tensor | None = None,  # of the sums that ``causal`` returned, where they have gradients
    floor: float = 0.0,
    unit: bool = False,
    blocks: Blocks | None = None,
) -> Gradients:
    """Gradients of q, k, v and, where ``causal`` started from sums, of their kv and z."""
    prefix = k.shape[2] - q.shape[2]
    if prefix:
        head = None if key_mask is None else key_mask[:, :prefix]
        tail = None if key_mask is None else key_mask[:, prefix:]
        start = accumulate(f_k, k[:, :, :prefix], v[:, :, :prefix], head, sums, blocks)
        rest = (k[:, :, prefix:], v[:, :, prefix:])
        dq, dk, dv, of_start = causal_backward(
            f_q, f_k, q, *rest, reading, grad, tail, start, grad_sums, log_scale, floor, unit, blocks
        )
        assert of_start is not None
        first = accumulate_backward(
            f_k, k[:, :, :prefix], v[:, :, :prefix], start[2], *of_start, key_mask=head, blocks=blocks
        )
        of_sums = None if sums is None else rescaled(of_start, sums[2], start[2])
        return dq, torch.cat([first[0], dk], 2), torch.cat([first[1], dv], 2), of_sums
    shape = causal_shape(f_k, q, v)
    group = (shape.key_heads, shape.heads // shape.key_heads)

    def run(sizes: Blocks) -> Gradients:
        span = span_of(shape, sizes)
        before, _ = states(f_k, k, v, key_mask, sums, span, blocks)
        factors = [torch.zeros_like(reading.denominator) for _ in range(4 if floor else 2)]
        rows = Rows(*factors, lost=reading.magnitude if f_k.logarithms else None)
        dq = torch.empty_like(q)
        new = k if shape.heads == shape.key_heads else k.new_empty(0, dtype=torch.float32)
        dk, dv = (new.new_empty(*q.shape[:-1], width) for width in (shape.width, shape.value_width))
        shared = (view(q), view(k), view(v), f_q.arguments(), f_k.arguments(), mask_view(key_mask))
        last = f_q.last if floor else None
        grid = (before[0].shape[2], 1, shape.batch * shape.heads)
        shared_constants = constants(f_k, shape, sizes)
        if q.numel():
            start_kernel(
                causal_queries,
                grid,
                *shared,
                *before,
                view(reading.out),
                view(grad),
                reading.denominator,
                reading.magnitude,
                floor,
                last,
                tuple(rows[:4]),
                view(dq),
                *sizes_of(shape, span),
                UNIT=unit,
                **shared_constants,
            )
        after, total = states_after(f_q, q, grad, rows, grad_sums, log_scale, span, shape, blocks)
        if q.numel():
            start_kernel(
                causal_keys,
                grid,
                *shared,
                *after,
                view(grad),
                reading.magnitude,
                last,
                tuple(rows[:4]),
                view(dk),
                view(dv),
                *sizes_of(shape, span),
                **shared_constants,
            )
        if dk.shape[1] != shape.key_heads:
            dk, dv = (x.unflatten(1, group).sum(2) for x in (dk, dv))
        of_sums = None
        if sums is not None:
            of_sums = of_initial(sums, total, group, f_k.logarithms)
        return dq, dk.to(k.dtype), dv.to(v.dtype), of_sums

    return first_that_fits("causal_backward", shape, causal_candidates(shape, blocks), run)


def states(
    f: FeatureMap, k: Tensor, v: Tensor, key_mask: Tensor | None, sums: Sums | None, span: int, blocks: Blocks | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Sums]:
    """Sums of everything before each span, (B, Hk, spans, ...), and of everything."""
    kv, z, top = span_sums(f, k, v, key_mask, span=span, blocks=blocks)
    count = k.new_full((k.shape[0],), k.shape[2], dtype=torch.float32) if key_mask is None else key_mask.sum(-1).float()
    if sums is None:
        kv, z = (torch.cat([torch.zeros_like(x[:, :, :1]), x], 2) for x in (kv, z))
        top = torch.cat([torch.full_like(top[:, :, :1], -torch.inf), top], 2)
    else:
        kv, z, top = (torch.cat([a.float()[:, :, None], x], 2) for a, x in zip(sums[:3], (kv, z, top), strict=True))
        count = count + sums[3].float()
    return running(kv[:, :, :-1], z[:, :, :-1], top[:, :, :-1]), (*merged(kv, z, top), count)


def states_after(
    f: FeatureMap,
    q: Tensor,
    grad: Tensor,
    rows: Rows,
    grad_sums: tuple[Tensor, Tensor] | None,
    log_scale: Tensor | None,
    span: int,
    shape: Shape,
    blocks: Blocks | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Sums over the queries of everything after each span, (B, H, spans, ...), and of everything."""
    kv, z, top = span_sums(f, q, grad, None, rows, key_heads=shape.key_heads, span=span, blocks=blocks)
    ends = (torch.zeros_like(kv[:, :, :1]), torch.zeros_like(z[:, :, :1]), torch.full_like(top[:, :, :1], -torch.inf))
    if grad_sums is not None:
        every = shape.heads // shape.key_heads  # one query head of each group takes what the sums themselves get
        for end, given in zip(ends, (*grad_sums, None if log_scale is None else -log_scale), strict=True):
            if given is not None and end.shape[-1]:
                end[:, ::every, 0] = given.float()
    kv, z, top = (torch.cat([x, end], 2).flip(2) for x, end in zip((kv, z, top), ends, strict=True))
    after = running(kv[:, :, :-1], z[:, :, :-1], top[:, :, :-1])
    a, b, c = (x.flip(2).contiguous() for x in after)
    return (a, b, c), merged(kv, z, top)


def running(kv: Tensor, z: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the spans up to and including each, (B, H, spans, ...)."""
    if top.shape[-1] == 0:
        return kv.cumsum(2), z.cumsum(2), top
    largest = top.cummax(2).values
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    share = (top[:, :, None] - shift[:, :, :, None]).exp()  # (B, H, spans, spans before, M)
    later = torch.ones(top.shape[2], top.shape[2], dtype=torch.bool, device=top.device).triu_(1)
    share = share.masked_fill(later[..., None], 0.0)
    return (
        torch.einsum("bhstm,bhtme->bhsme", share, kv).contiguous(),
        torch.einsum("bhstm,bhtm->bhsm", share, z).contiguous(),
        largest.contiguous(),
    )


def of_initial(
    sums: Sums, total: tuple[Tensor, Tensor, Tensor], group: tuple[int, int], logarithms: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the kv and z that a walk started from, from the sums over all queries, (B, H, M, ...)."""
    kv, z, top = total
    if logarithms:
        scale = (sums[2].float().repeat_interleave(group[1], 1) + top).exp()
        kv, z = kv * scale[..., None], z * scale
    return kv.unflatten(1, group).sum(2), z.unflatten(1, group).sum(2)


def causal_shape(f: FeatureMap, q: Tensor, v: Tensor) -> Shape:
    """Sizes of a causal launch, refused where its sums do not fit into registers."""
    shape = shape_of(f, q, v, v.shape[1])
    if padded(shape.features) * padded(shape.value_width) > _MOST_STATE or padded(shape.width) > 128:
        raise NoKernelError(
            f"causal attention with {shape.features} features, keys of width {shape.width} and values of width "
            f"{shape.value_width}: kernels take at most {_MOST_STATE} sums and width 128"
        )
    return shape


def causal_candidates(shape: Shape, blocks: Blocks | None) -> Sequence[Blocks]:
    """Chunks to try, the preferred ones first."""
    if blocks is not None:
        return [blocks]
    return [Blocks(32, 0, 8, 1), Blocks(16, 0, 4, 1)]  # of 64 tokens, compiled for 9.0, twice as much is spilled


def span_of(shape: Shape, blocks: Blocks) -> int:
    """Tokens of a span: enough spans to keep a device busy, each of several chunks."""
    chunks = cdiv(max(shape.length, 1), blocks.tokens)
    wanted = cdiv(_PROGRAMS, max(1, shape.batch * shape.heads))
    number = max(1, min(wanted, chunks // _LEAST_CHUNKS, _MOST_SPANS))
    return cdiv(chunks, number) * blocks.tokens


def sizes_of(shape: Shape, span: int) -> tuple[int, ...]:
    """What the causal kernels call H, Hk, N, span, M, D and E."""
    return shape.heads, shape.key_heads, shape.length, span, *shape.sizes()


def constants(f: FeatureMap, shape: Shape, blocks: Blocks) -> dict[str, Any]:
    """Constants of a launch over chunks, with all features in one block."""
    of_blocks = options(f, shape, blocks._replace(features=padded(shape.features)))
    return {"BC": of_blocks.pop("BT"), **of_blocks}
