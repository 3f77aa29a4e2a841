"""accumulate and read by the compiled kernels; the same tensors in and out as ``core.fast.sums`` and ``read``."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from ..algebra import exp_difference
from ..fast.causal import Problem
from ..fast.memory import like_queries
from ..fast.read import Finish
from ..fast.spec import Side, Spec
from .layout import ArrayStruct, MapStruct, array_of, layout_of, pointer, run, takes
from .library import library

_LEAST_BLOCKS = 4  # of a task: less, and its sums cost as much as its tokens
_FRESH_BYTES = 1 << 25  # from here on, memory comes straight from the system
_TASKS = 4  # per thread, so that one that is held up does not hold up all


class _Accumulate(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("size", "batch", "heads", "length", "width", "splits")),
        ("map", MapStruct),
        ("k", ArrayStruct),
        ("v", ArrayStruct),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_token", c_int64),
        *((name, c_void_p) for name in ("kv", "z", "log_scale")),
    ]


class CausalStruct(ctypes.Structure):
    """``Causal`` of causal.h."""

    _fields_ = [
        *((name, c_int64) for name in ("size", "batch", "heads", "key_heads", "length", "width", "splits")),
        ("query", MapStruct),
        ("key", MapStruct),
        *((name, ArrayStruct) for name in ("q", "k", "v", "out")),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_token", c_int64),
        *((name, c_void_p) for name in ("weights", "kv", "z", "last_kv", "last_z")),
        ("floor", c_double),
        ("gamma", c_void_p),
        ("beta", c_void_p),
    ]


class _Read(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("size", "batch", "heads", "length", "width", "chunks", "fresh")),
        ("map", MapStruct),
        ("q", ArrayStruct),
        ("out", ArrayStruct),
        *((name, c_void_p) for name in ("kv", "z", "log_scale")),
        ("floor", c_double),
        *((name, c_void_p) for name in ("constant_kv", "constant_z", "gamma", "beta")),
    ]


@lru_cache(maxsize=4)
def _block_tokens(kernels: ctypes.CDLL) -> int:
    return int(kernels.maclin_block_tokens())


def pieces(length: int, rows: int) -> int:
    """Into how many the tokens of each of so many heads are cut, so that every thread has enough to do."""
    kernels = library()
    assert kernels is not None
    blocks = -(-length // _block_tokens(kernels))
    wanted = -(-_TASKS * torch.get_num_threads() // max(rows, 1)) if torch.get_num_threads() > 1 else 1
    return max(1, min(wanted, blocks // _LEAST_BLOCKS))


def accumulate(
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None,  # (B, S)
    side: Side,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """kv (B, Hk, F, Dv), z (B, Hk, F) and log_scale (B, Hk, F or 0); None where torch is to compute them."""
    if not takes_keys(k, v, key_mask, side, spec):
        return None
    return _accumulate(k, v, key_mask, side, spec, pieces(k.shape[2], k.shape[0] * k.shape[1]))[0]


def takes_keys(k: Tensor, v: Tensor, key_mask: Tensor | None, side: Side, spec: Spec) -> bool:
    """Whether the kernels take these keys."""
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.device.type != "cpu"):
        return False
    return takes(spec, side, k, v) and k.numel() > 0 and v.numel() > 0


def _accumulate(
    k: Tensor, v: Tensor, key_mask: Tensor | None, side: Side, spec: Spec, splits: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The sums; and kv (splits, B, Hk, F, Dv) and z of each piece of the tokens."""
    batch, heads, length, head_dim = k.shape
    layout = layout_of(spec, side, head_dim)
    total = num_features(layout.struct)
    like = torch.empty(0, dtype=torch.float32)
    kv = like.new_empty(splits, batch, heads, total, v.shape[3])
    z = like.new_empty(splits, batch, heads, total)
    log_scale = like.new_empty(splits, batch, heads, total if spec.log_domain else 0)
    run(
        "maclin_accumulate",
        _Accumulate(
            ctypes.sizeof(_Accumulate), batch, heads, length, v.shape[3], splits, layout.struct,
            array_of(k), array_of(v), pointer(key_mask), *((0, 0) if key_mask is None else key_mask.stride()),
            pointer(kv), pointer(z), pointer(log_scale),
        ),
    )  # fmt: skip
    if splits == 1:
        return (kv[0], z[0], log_scale[0]), kv, z
    if not spec.log_domain:
        return (kv.sum(0), z.sum(0), log_scale[0].clone()), kv, z
    top = log_scale.amax(0)
    shrink = exp_difference(log_scale, top)
    return ((kv * shrink[..., None]).sum(0), (z * shrink).sum(0), top), kv, z


def num_features(struct: MapStruct) -> int:
    """F."""
    kernels = library()
    assert kernels is not None
    return int(kernels.maclin_features(ctypes.byref(struct)))


def read(
    q: Tensor,  # (B, H, N, D)
    kv: Tensor,  # (B, H, F, Dv)
    z: Tensor,  # (B, H, F)
    log_scale: Tensor,  # (B, H, F or 0)
    finish: Finish,
    side: Side,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor | None:
    """Out (B, H, N, Dv) of this dtype; None where torch is to compute it."""
    given = [x for x in (kv, z, *finish[1:]) if x is not None]
    if not takes(spec, side, q, *given) or dtype != q.dtype or not q.numel() or not kv.numel():
        return None
    batch, heads, length, head_dim = q.shape
    layout = layout_of(spec, side, head_dim)
    out = like_queries(q, kv.shape[3])
    kv, z = floats(kv), floats(z)
    logs = floats(log_scale) if log_scale.shape[-1] else None
    constant_kv, constant_z, gamma, beta = (None if x is None else floats(x) for x in finish[1:])
    run(
        "maclin_read",
        _Read(
            ctypes.sizeof(_Read), batch, heads, length, kv.shape[3], pieces(length, batch * heads),
            out.is_contiguous() and out.nbytes >= _FRESH_BYTES, layout.struct, array_of(q), array_of(out),
            pointer(kv), pointer(z), pointer(logs), finish.floor,
            pointer(constant_kv), pointer(constant_z), pointer(gamma), pointer(beta),
        ),
    )  # fmt: skip
    return out


def takes_causal(problem: Problem, dtype: torch.dtype) -> bool:
    """Whether the kernels take this."""
    q, k, v, key_mask, weights, kv, z, finish, query, key, query_spec, key_spec = problem
    given = [x for x in (weights, kv, z, finish.gamma, finish.beta) if x is not None]
    if not takes_keys(k, v, key_mask, key, key_spec) or not takes(query_spec, query, q, *given) or dtype != q.dtype:
        return False
    return q.numel() > 0 and kv.numel() > 0


def splits_of(problem: Problem) -> int:
    """Pieces of each head, which need their sums first: only where threads would have nothing to do."""
    rows = problem.k.shape[0] * problem.k.shape[1]
    return pieces(problem.q.shape[2], rows) if rows < torch.get_num_threads() else 1


def sums_before(problem: Problem, splits: int) -> tuple[Tensor, Tensor]:
    """kv (splits, B, Hk, F, Dv) and z before the first token of each piece."""
    kv, z = floats(problem.kv)[None], floats(problem.z)[None]
    if splits > 1:
        _, of_kv, of_z = _accumulate(problem.k, problem.v, problem.key_mask, problem.key, problem.key_spec, splits)
        kv, z = (torch.cat([x, of[:-1]]).cumsum(0) for x, of in ((kv, of_kv), (z, of_z)))
    return kv, z


def causal_struct(
    problem: Problem,
    splits: int,
    kv: Tensor,
    z: Tensor,
    out: tuple[Tensor, Tensor, Tensor] | None,
    held: list[Tensor | None],
) -> CausalStruct:
    """With the weights, gamma and beta that the caller holds, and what is written to, if anything."""
    q, k, v, key_mask = problem.q, problem.k, problem.v, problem.key_mask
    written = (ArrayStruct(), None, None) if out is None else (array_of(out[0]), pointer(out[1]), pointer(out[2]))
    return CausalStruct(
        ctypes.sizeof(CausalStruct), *q.shape[:2], k.shape[1], q.shape[2], v.shape[3], splits,
        layout_of(problem.query_spec, problem.query, q.shape[3]).struct,
        layout_of(problem.key_spec, problem.key, q.shape[3]).struct,
        array_of(q), array_of(k), array_of(v), written[0],
        pointer(key_mask), *((0, 0) if key_mask is None else key_mask.stride()),
        pointer(held[0]), pointer(kv), pointer(z), *written[1:], problem.finish.floor,
        pointer(held[1]), pointer(held[2]),
    )  # fmt: skip


def causal(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """Out (B, H, N, Dv) of this dtype, and the sums after the last token; None where torch is to compute them."""
    if not takes_causal(problem, dtype):
        return None
    splits = splits_of(problem)
    kv, z = sums_before(problem, splits)
    q, v = problem.q, problem.v
    out = like_queries(q, v.shape[3]), torch.empty_like(kv[0]), torch.empty_like(z[0])
    held = [None if x is None else floats(x) for x in (problem.weights, problem.finish.gamma, problem.finish.beta)]
    run("maclin_causal", causal_struct(problem, splits, kv, z, out, held))
    return out


def floats(x: Tensor) -> Tensor:
    """As the kernels want numbers that are not blocks of tokens."""
    return x.detach().to(torch.float32).contiguous()
