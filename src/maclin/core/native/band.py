"""The hybrid by the compiled kernel; the same as ``core.compose``."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from ..fast.maps import Maps
from ..sinks import Sinks
from .calls import floats, pieces, takes_keys
from .layout import ArrayStruct, MapStruct, array_of, layout_of, pointer, run, takes


class _Band(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("size", "batch", "heads", "key_heads", "length", "keys")),
        *((name, c_int64) for name in ("width", "window", "chunks", "origin", "causal")),
        ("query", MapStruct),
        ("key", MapStruct),
        *((name, ArrayStruct) for name in ("q", "k", "v", "out", "left", "right")),
        ("depth", c_int64),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_token", c_int64),
        *((name, c_void_p) for name in ("weights", "kv", "z", "last_kv", "last_z", "lift")),
        ("floor", c_double),
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("sinks", c_int64),
        ("sink_right", ArrayStruct),
        ("sink_v", ArrayStruct),
        ("sink_mask", c_void_p),
        ("sink_position", c_void_p),
    ]


def takes_band(maps: Maps, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *others: Tensor | None) -> bool:
    """Whether the kernel computes this; it has no backward."""
    if torch.compiler.is_compiling() or maps.key_spec.family != "product" or not q.numel():
        return False
    gradients = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, maps.q_weights, maps.gamma, maps.beta, *others)
    )
    sides_fit = takes_keys(k, v, key_mask, maps.key, maps.key_spec) and takes(maps.query_spec, maps.query, q)
    return sides_fit and not gradients and v.dtype == q.dtype


class Window(NamedTuple):
    """Which weights are exact: exp(left right) of the keys at most ``size`` away; features lack exp(lift)."""

    left: Tensor  # (B, H, N, E)
    right: Tensor  # (B, Hk, S, E)
    lift: Tensor | None  # (B, H, N), or 0
    size: int
    sinks: Sinks | None = None  # keys as ``right`` has them; a position is that of a query, for causal calls


def band(
    maps: Maps,
    q: Tensor,  # (B, H, N, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None,
    window: Window,
    floor: float,
) -> Tensor:
    """Out (B, H, N, Dv), not causal, of what ``takes_band`` takes; the last query stands at the last key."""
    kv, z, _ = maps.sums(k, v, key_mask)
    return _run(maps, q, k, v, key_mask, window, floor, floats(kv), floats(z), None)


def causal_band(
    maps: Maps,
    q: Tensor,  # (B, H, N, D)
    k: Tensor,  # (B, Hk, window + 1 + N, D)
    v: Tensor,  # (B, Hk, window + 1 + N, Dv)
    key_mask: Tensor,
    window: Window,
    floor: float,
    kv: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, and the sums of all keys but the last window + 1; kv and z are those of the keys before."""
    kv, z = (floats(x) for x in maps.bare(kv, z))
    last = torch.empty_like(kv), torch.empty_like(z)
    out = _run(maps, q, k, v, key_mask, window, floor, kv, z, last)
    return out, *maps.weighted(*last)


def _run(
    maps: Maps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    window: Window,
    floor: float,
    kv: Tensor,
    z: Tensor,
    last: tuple[Tensor, Tensor] | None,
) -> Tensor:
    batch, heads, length, head_dim = q.shape
    weights = maps.weights(kv, heads)
    given = (weights, window.lift, maps.gamma, maps.beta)
    weights, lift, gamma, beta = (None if x is None else floats(x) for x in given)
    out = q.new_empty(batch, heads, length, v.shape[3])
    causal = last is not None
    sinks = window.sinks
    if sinks is None:
        none = ArrayStruct()
        of_sinks = 0, none, none, None, None
    else:
        # as int64 and bytes; what every query sees stands before the first
        position = (sinks.position if causal else torch.full_like(sinks.position, -1)).contiguous()
        seen = sinks.mask.contiguous()
        of_sinks = (
            sinks.k.shape[2], array_of(sinks.k), array_of(sinks.v), pointer(seen), pointer(position),
        )  # fmt: skip
    last_kv, last_z = last or (None, None)
    run(
        "maclin_band",
        _Band(
            ctypes.sizeof(_Band), batch, heads, k.shape[1], length, k.shape[2], v.shape[3], window.size,
            1 if causal else pieces(length, batch * heads), 0 if causal else k.shape[2] - length - window.size, causal,
            layout_of(maps.query_spec, maps.query.for_heads(heads), head_dim).struct,
            layout_of(maps.key_spec, maps.key, head_dim).struct,
            *(array_of(x) for x in (q, k, v, out, window.left, window.right)), window.left.shape[3],
            pointer(key_mask), *((0, 0) if key_mask is None else key_mask.stride()),
            *(pointer(x) for x in (weights, kv, z, last_kv, last_z, lift)), floor, pointer(gamma), pointer(beta),
            *of_sinks,
        ),
    )  # fmt: skip
    return out
