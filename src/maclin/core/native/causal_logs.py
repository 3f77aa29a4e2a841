"""Causal attention with positive features, whose logarithms are handed over, by the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..fast.memory import like_queries
from ..fast.spec import Side, Spec
from .calls import floats, takes_keys
from .layout import ArrayStruct, MapStruct, array_of, layout_of, pointer, run, takes
from .library import library

Found = tuple[Tensor, Tensor, Tensor, Tensor]
Plain = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Found]
"""The same in torch: q, k, v, kv, z and log_scale -> out and the sums after the last token."""
_LEAST_TOKENS = 16  # fewer take as long as a whole chunk, and torch is faster: .48 ms for one token instead of .77


class _CausalLogs(ctypes.Structure):
    _fields_ = [  # ``CausalLogs`` of causal_logs.h
        *((name, c_int64) for name in ("size", "batch", "heads", "key_heads", "length", "width")),
        ("query", MapStruct),
        ("key", MapStruct),
        *((name, ArrayStruct) for name in ("q", "k", "v", "out")),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_token", c_int64),
        *((name, c_void_p) for name in ("kv", "z", "log_scale", "last_kv", "last_z", "last_log_scale")),
        *((name, ArrayStruct) for name in ("d", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("per_row", "tops", "behind_kv", "behind_z", "first_kv", "first_z")),
    ]


def takes_logs(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, sides: tuple[Side, Side], specs: tuple[Spec, Spec]
) -> bool:
    """Whether the kernels take this; sides and specs are those of queries and of keys."""
    if torch.compiler.is_compiling() or q.shape[2] < _LEAST_TOKENS or any(spec.family != "positive" for spec in specs):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for side in sides for x in side):
        return False
    if any(x.device.type != "cpu" for x in (q, k, v)) or q.dtype != v.dtype:
        return False
    return takes_keys(k, v, key_mask, sides[1], specs[1]) and takes(specs[0], sides[0], q) and q.numel() > 0


def causal_logs(
    q: Tensor,  # (B, H, N, D)
    k: Tensor,  # (B, Hk, N, D)
    v: Tensor,  # (B, Hk, N, Dv)
    sums: tuple[Tensor, Tensor, Tensor],  # kv (B, Hk, F, Dv), z (B, Hk, F) and log_scale (B, Hk, F) before the first
    key_mask: Tensor | None,  # (B, N)
    sides: tuple[Side, Side],
    specs: tuple[Spec, Spec],
    plain: Plain,
) -> Found:
    """Out (B, H, N, Dv) in q's dtype and the sums after the last token; differentiable.

    ``plain`` computes derivatives that are themselves to be differentiated, and those without kernels.
    """
    call = _Call(key_mask, sides, specs, plain)
    return _CausalLogsFunction.apply(q, k, v, *sums, call)  # pyright: ignore[reportReturnType]


class _Call:
    """What is no tensor with a derivative."""

    def __init__(self, mask: Tensor | None, sides: tuple[Side, Side], specs: tuple[Spec, Spec], plain: Plain) -> None:
        self.mask, self.sides, self.specs, self.plain = mask, sides, specs, plain

    def struct(self, q: Tensor, k: Tensor, v: Tensor, sums: list[Tensor], last: list[Tensor]) -> _CausalLogs:
        """With everything but what is written to; the caller holds all tensors."""
        maps = (layout_of(spec, side, q.shape[3]).struct for spec, side in zip(self.specs, self.sides, strict=True))
        return _CausalLogs(
            ctypes.sizeof(_CausalLogs), *q.shape[:2], k.shape[1], q.shape[2], v.shape[3], *maps,
            array_of(q), array_of(k), array_of(v), ArrayStruct(),
            pointer(self.mask), *((0, 0) if self.mask is None else self.mask.stride()),
            *(pointer(x) for x in (*sums, *last)),
        )  # fmt: skip


class _CausalLogsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Found:
        q, k, v, kv, z, log_scale, call = inputs
        sums = [floats(x) for x in (kv, z, log_scale)]
        last = [torch.empty_like(x) for x in sums]
        out = like_queries(q, v.shape[3])
        struct = call.struct(q, k, v, sums, last)
        struct.out = array_of(out)
        run("maclin_causal_logs", struct)
        ctx.call = call
        ctx.save_for_backward(q, k, v, kv, z, log_scale, last[2])
        ctx.mark_non_differentiable(last[2])
        return out, *last  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kv, z, log_scale, last = ctx.saved_tensors
        call: _Call = ctx.call
        if torch.is_grad_enabled() or library() is None:
            return *_by_torch(ctx, (q, k, v, kv, z, log_scale), grads), None, None
        d, behind = grads[0], [floats(x) for x in grads[1:3]]
        sums = [floats(x) for x in (kv, z, log_scale)]
        batch, heads, length, _ = q.shape
        groups = heads // k.shape[1]
        dq, dk, dv = torch.empty_like(q), *(_per_head(x, groups) for x in (k, v))
        per_row = last.new_empty(2, batch, heads, length)
        kernels = library()
        assert kernels is not None
        blocks = -(-length // int(kernels.maclin_block_tokens()))
        tops = last.new_empty(batch, heads, blocks, last.shape[-1])
        first = [last.new_empty(batch, heads, *x.shape[2:]) for x in sums[:2]]
        struct = call.struct(q, k, v, sums, [behind[0], behind[1], last])  # only the last of them is read
        struct.d, struct.dq, struct.dk, struct.dv = (array_of(x) for x in (d, dq, dk, dv))
        struct.per_row, struct.tops = pointer(per_row), pointer(tops)
        struct.behind_kv, struct.behind_z = pointer(behind[0]), pointer(behind[1])
        struct.first_kv, struct.first_z = pointer(first[0]), pointer(first[1])
        run("maclin_causal_logs_queries", struct)
        run("maclin_causal_logs_keys", struct)
        found = [x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv, *first)]
        return dq, found[0].to(k.dtype), found[1].to(v.dtype), found[2].to(kv.dtype), found[3].to(z.dtype), None, None


def _per_head(x: Tensor, groups: int) -> Tensor:
    """For the derivatives of keys or values: those of query heads are summed later."""
    if groups == 1:
        return torch.empty_like(x)
    return torch.empty(x.shape[0], x.shape[1] * groups, *x.shape[2:], dtype=torch.float32)


def _by_torch(ctx: Any, given: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not again:
            given = tuple(x.detach().requires_grad_(need) for x, need in zip(given, ctx.needs_input_grad, strict=False))
        out, kv, z, _ = ctx.call.plain(*given)
        wanted = [x for x, need in zip(given[:5], ctx.needs_input_grad, strict=False) if need]
        found = iter(torch.autograd.grad((out, kv, z), wanted, grads[:3], create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[:5]]
