"""The hybrid by the compiled kernels: out, and its derivatives; the same as ``core.compose``."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fast.memory import like_queries
from ..fast.spec import Side, Spec
from .calls import floats, pieces
from .layout import ArrayStruct, MapStruct, array_of, layout_of, pointer, run
from .library import library


class Problem(NamedTuple):
    """What both directions take.

    Query i sees exactly, with weight exp(scale <left_i, right_j>), the keys at most ``window`` away, and the sinks; the
    others by features, which lack exp(lift_i). Not causal, the last query stands at the last key, and kv and z are the
    sums of all keys; causal, query i stands at key i + window + 1, and they are those of the keys before the first.

    Args:
        q: (B, H, N, D).
        k: (B, Hk, S, D); causal, S = N + window + 1.
        v: (B, Hk, S, Dv).
        key_mask: (B, S) or None.
        left: (B, H, N, E), or None for q itself.
        right: (B, Hk, S, E), or None for k itself.
        lift: (B, H, N) or None for 0.
        weights: (H, F) of the products of features, or None for 1.
        kv: (B, Hk, F, Dv), without weights; F may be 0.
        z: (B, Hk, F).
        gamma: (H,) of ppSBN's second half, or None.
        beta: (H,) of the same.
        sink_right: (B, Hk, sinks, E), or None.
        sink_v: (B, Hk, sinks, Dv).
        sink_mask: (B, sinks).
        sink_position: (B, sinks), the first query that sees each.
        query: the map of queries, a row per query head.
        key: the map of keys.
        query_spec: its numbers.
        key_spec: its numbers.
        scale: of the exponents.
        floor: as of ``fast.read.Finish``.
        window: keys on each side.
        causal: see above.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    left: Tensor | None
    right: Tensor | None
    lift: Tensor | None
    weights: Tensor | None
    kv: Tensor
    z: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    sink_right: Tensor | None
    sink_v: Tensor | None
    sink_mask: Tensor | None
    sink_position: Tensor | None
    query: Side
    key: Side
    query_spec: Spec
    key_spec: Spec
    scale: float
    floor: float
    window: int
    causal: bool


class Derivatives(NamedTuple):
    """Of what ``Problem`` has, by name; None where there is none, or was none wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    lift: Tensor | None = None
    weights: Tensor | None = None
    kv: Tensor | None = None
    z: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    sink_right: Tensor | None = None
    sink_v: Tensor | None = None


class _Band(ctypes.Structure):
    _fields_ = [  # ``Band`` of band_near.h
        *((name, c_int64) for name in ("size", "batch", "heads", "key_heads", "length", "keys")),
        *((name, c_int64) for name in ("width", "window", "chunks", "together", "origin", "causal")),
        ("query", MapStruct),
        ("key", MapStruct),
        *((name, ArrayStruct) for name in ("q", "k", "v", "out", "left", "right")),
        ("depth", c_int64),
        ("scale", c_double),
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


class _BandBackward(ctypes.Structure):
    _fields_ = [  # ``BandBackward`` of band_backward.h
        ("size", c_int64),
        ("of", _Band),
        *((name, ArrayStruct) for name in ("d", "dq", "dk", "dv", "dleft", "dright")),
        *((name, c_void_p) for name in ("of_lift", "of_kv", "of_z", "of_weights", "of_gamma", "of_beta")),
        *((name, c_void_p) for name in ("of_sink_right", "of_sink_v", "rest_k", "rest_right", "rest_v", "per_row")),
        ("through_post", ArrayStruct),
    ]


class _BandFar(ctypes.Structure):
    _fields_ = [  # ``BandFar`` of band_far.h
        ("size", c_int64),
        ("of", _Band),
        *((name, ArrayStruct) for name in ("d", "dk", "dv")),
        *((name, c_void_p) for name in ("per_row", "of_last_kv", "of_last_z", "of_kv", "of_z")),
    ]


class _Filled:
    """The structure of a problem, with the tensors that it points to."""

    def __init__(self, problem: Problem, out: Tensor | None, last: tuple[Tensor, Tensor] | None, chunks: int) -> None:
        p = problem
        batch, heads, length, head_dim = p.q.shape
        given = (p.weights, p.kv, p.z, p.lift, p.gamma, p.beta)
        weights, kv, z, lift, gamma, beta = (None if x is None else floats(x) for x in given)
        seen = None if p.sink_mask is None else p.sink_mask.contiguous()
        position = None if p.sink_position is None else p.sink_position.contiguous()
        self.held = (weights, kv, z, lift, gamma, beta, seen, position, out, last)
        layouts = (layout_of(p.query_spec, p.query, head_dim), layout_of(p.key_spec, p.key, head_dim))
        self.layouts = layouts
        key_heads, total, width = p.k.shape[1], p.k.shape[2], p.v.shape[3]
        rows, threads = batch * key_heads, torch.get_num_threads()
        together = heads // key_heads if chunks > 1 or rows >= threads else 1
        self.struct = _Band(
            ctypes.sizeof(_Band), batch, heads, key_heads, length, total, width, p.window, chunks, together,
            0 if p.causal else total - length - p.window, p.causal, layouts[0].struct, layouts[1].struct,
            *(_array(x) for x in (p.q, p.k, p.v, out, p.left, p.right)),
            head_dim if p.left is None else p.left.shape[3], p.scale,
            pointer(p.key_mask), *((0, 0) if p.key_mask is None else p.key_mask.stride()),
            *(pointer(x) for x in (weights, kv, z, *(last or (None, None)), lift)), p.floor,
            pointer(gamma), pointer(beta), 0 if p.sink_v is None else p.sink_v.shape[2],
            _array(p.sink_right), _array(p.sink_v), pointer(seen), pointer(position),
        )  # fmt: skip


def band(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Out (B, H, N, Dv), and the sums of all keys but the last window + 1; these are empty where not causal."""
    q, v = problem.q, problem.v
    out = like_queries(q, v.shape[3])
    shapes = (problem.kv.shape, problem.z.shape) if problem.causal else ((0,), (0,))
    last_kv, last_z = (torch.empty(shape, dtype=torch.float32) for shape in shapes)
    chunks = 1 if problem.causal else pieces(q.shape[2], q.shape[0] * problem.k.shape[1])
    filled = _Filled(problem, out, (last_kv, last_z), chunks)
    run("maclin_band", filled.struct)
    return out, last_kv, last_z


def band_backward(problem: Problem, d: Tensor, dkv: Tensor, dz: Tensor, wanted: str) -> Derivatives:
    """Derivatives, given those of ``band``; ``wanted`` names those of small tensors that are needed."""
    p, names = problem, wanted.split()
    batch, heads, length, _ = p.q.shape
    key_heads, total, width = p.k.shape[1], p.k.shape[2], p.v.shape[3]
    features = p.z.shape[2]
    chunks = 1 if p.causal else pieces(length, batch * key_heads)
    filled = _Filled(p, None, None, chunks)
    like = torch.empty(0, dtype=torch.float32)

    def new(name: str, there: bool, *shape: int) -> Tensor | None:
        return like.new_empty(shape) if there and (name in names or not name) else None

    whole = total == length or (p.causal and p.right is None)  # then every key is near a query
    dq = torch.empty_like(p.q)
    dk, dv = (torch.empty_like(x) if whole else torch.zeros_like(x) for x in (p.k, p.v))
    dleft = None if p.left is None else torch.empty_like(p.left)
    dright = None if p.right is None else torch.zeros_like(p.right)
    sinks = 0 if p.sink_v is None else p.sink_v.shape[2]
    depth = filled.struct.depth
    of_lift = new("lift", p.lift is not None, batch, heads, length)
    of_kv, of_z = (like.new_empty(chunks, *x.shape) for x in (p.kv, p.z))
    of_weights = new("weights", p.weights is not None, chunks, batch, heads, features)
    of_gamma, of_beta = (new("", p.gamma is not None, chunks, batch, heads) for _ in range(2))
    of_right, of_v = (new("", sinks > 0, chunks, batch, key_heads, sinks, x) for x in (depth, width))
    ring = _ring_tokens(p.window)
    apart = p.right is not None
    rest = [
        new("", chunks > 1 and there, chunks, batch, key_heads, ring, size)
        for size, there in ((p.k.shape[3], features > 0 or not apart), (depth, apart), (width, True))
    ]
    per_row = new("", p.causal, batch, heads, length, 4)
    through_post = new("", p.causal and p.gamma is not None, batch, heads, length, width)
    run(
        "maclin_band_backward",
        _BandBackward(
            ctypes.sizeof(_BandBackward), filled.struct, *(_array(x) for x in (d, dq, dk, dv, dleft, dright)),
            *(pointer(x) for x in (of_lift, *((None, None) if p.causal else (of_kv, of_z)), of_weights)),
            *(pointer(x) for x in (of_gamma, of_beta, of_right, of_v, *rest, per_row)), _array(through_post),
        ),
    )  # fmt: skip
    for chunk in range(chunks - 1):
        _add_rest(p, chunk, chunks, ((dk, rest[0]), (dright, rest[1]), (dv, rest[2])))
    found = [_total(x) for x in (of_kv, of_z, of_weights, of_gamma, of_beta, of_right, of_v)]
    if p.causal and features:
        assert per_row is not None
        found[:2] = _far(filled, d if through_post is None else through_post, dk, dv, per_row, dkv, dz)
    kv, z, weights, gamma, beta, sink_right, sink_v = found
    if gamma is not None and beta is not None:
        gamma, beta = gamma.sum(0), beta.sum(0)
    if weights is not None:
        weights = weights.sum(0)
    return Derivatives(dq, dk, dv, dleft, dright, of_lift, weights, kv, z, gamma, beta, sink_right, sink_v)


def _far(
    filled: _Filled, d: Tensor, dk: Tensor, dv: Tensor, per_row: Tensor, dkv: Tensor, dz: Tensor
) -> list[Tensor | None]:
    """What keys behind the window add to dk and dv; and derivatives of the sums before the first."""
    dkv, dz = floats(dkv), floats(dz)
    of_kv, of_z = torch.empty_like(dkv), torch.empty_like(dz)
    arrays = (array_of(x) for x in (d, dk, dv))
    pointers = (pointer(x) for x in (per_row, dkv, dz, of_kv, of_z))
    run("maclin_band_far", _BandFar(ctypes.sizeof(_BandFar), filled.struct, *arrays, *pointers))
    return [of_kv, of_z]


def _block_tokens() -> int:
    kernels = library()
    assert kernels is not None
    return int(kernels.maclin_block_tokens())


def _ring_tokens(window: int) -> int:
    """Keys that a block of queries and those around it lie among, in whole blocks."""
    block = _block_tokens()
    return (3 * block - 2 + 2 * window) // block * block


def _add_rest(p: Problem, chunk: int, chunks: int, pairs: tuple[tuple[Tensor | None, Tensor | None], ...]) -> None:
    """Add to keys that the next chunk has written what this one gives them."""
    block, total = _block_tokens(), p.k.shape[2]
    blocks = -(-p.q.shape[2] // block)
    first = blocks * (chunk + 1) // chunks * block + total - p.q.shape[2] - p.window
    start = max(first, 0) // block * block
    # as far as the last query of this chunk sees
    stop = min(-(-(first + 2 * p.window) // block) * block, total)
    for to, rest in pairs:
        if to is not None and rest is not None and stop > start:
            to[:, :, start:stop] += rest[chunk, :, :, : stop - start]


def _total(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[0] if len(x) == 1 else x.sum(0)


def _array(x: Any) -> ArrayStruct:
    return ArrayStruct() if x is None else array_of(x)
