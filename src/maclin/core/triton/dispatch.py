"""From maps to kernels: whole calls, differentiable, or None where the torch path has to take them."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algebra import grouped
from ..fast.maps import Maps
from ..fast.spec import prepared
from . import NoKernelError, enabled
from . import attention as kernels
from .specification import feature_map


def attend(maps: Maps, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, floor: float) -> Tensor | None:
    """Bidirectional out (B, H, N, Dv) before ppSBN's second half, by kernels; None where they do not run.

    Norms run in torch, before. A map that differs between the query heads of a group repeats the keys for them.
    """
    if not enabled() or q.dtype == torch.float64:
        return None
    heads, key_heads = q.shape[1], k.shape[1]
    rows = {len(x) for x in (maps.q_weights, *maps.query) if x is not None and x.dim() > 1}
    query, key, k_weights = maps.query, maps.key, maps.k_weights
    try:
        q = prepared(maps.query_spec, query._replace(shift=None).for_heads(heads), q)
        k = prepared(maps.key_spec, key._replace(shift=None), k)
        if rows - {key_heads}:
            k, v = k.repeat_interleave(heads // key_heads, dim=1), v.repeat_interleave(heads // key_heads, dim=1)
            query, key = query.for_heads(heads), key.for_heads(heads)
            k_weights = None if k_weights is None else grouped(k_weights[None], heads)[0]
            key_heads = heads
        q_weights = maps.q_weights
        if q_weights is not None and len(q_weights) != key_heads:
            q_weights = grouped(q_weights[None], key_heads)[0]
        sides = ((maps.query_spec, query, q_weights), (maps.key_spec, key, k_weights))
        f_q, f_k = (
            feature_map(replace(spec, norm=""), side, q.shape[3], key_heads, None if w is None else w.to(q.device))
            for spec, side, w in sides
        )
        return _Attend.apply(q, k, v, key_mask, f_q, f_k, floor)
    except NoKernelError:
        return None


class _Attend(torch.autograd.Function):
    """The kernels' attention with the gradients of q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
        f_q, f_k, floor = options
        reading, sums = kernels.attend(f_q, f_k, q, k, v, mask, floor=floor)
        ctx.save_for_backward(q, k, v, mask)
        ctx.kept = reading, sums, options
        return reading.out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        reading, sums, (f_q, f_k, floor) = ctx.kept
        dq, dk, dv = kernels.attend_backward(f_q, f_k, q, k, v, reading, sums, grads[0].contiguous(), mask, floor=floor)
        return dq, dk, dv, *(None for _ in range(4))
