"""Derivatives of accumulate and read by the compiled kernels, as the custom operators give them."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from ..fast.read import Finish
from ..fast.spec import Side, Spec
from .calls import floats, pieces, takes_keys
from .layout import ArrayStruct, MapStruct, array_of, layout_of, pointer, run, takes

_SUMS = ("kv", "z", "log_scale")


class _ReadBackward(ctypes.Structure):
    _fields_ = [  # ``ReadBackward`` of backward.h
        *((name, c_int64) for name in ("size", "batch", "heads", "length", "width", "chunks")),
        ("map", MapStruct),
        *((name, ArrayStruct) for name in ("q", "d", "dq")),
        *((name, c_void_p) for name in _SUMS),
        ("floor", c_double),
        *((name, c_void_p) for name in ("constant_kv", "constant_z", "gamma", "beta")),
        *((name, c_void_p) for name in ("of_kv", "of_z", "of_constant_kv", "of_constant_z", "of_gamma", "of_beta")),
        ("of_shift", c_void_p),
    ]


class _AccumulateBackward(ctypes.Structure):
    _fields_ = [  # ``AccumulateBackward`` of backward.h
        *((name, c_int64) for name in ("size", "batch", "heads", "length", "width", "chunks")),
        ("map", MapStruct),
        *((name, ArrayStruct) for name in ("k", "v", "dk", "dv")),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_token", c_int64),
        *((name, c_void_p) for name in _SUMS),
    ]


def knows(wanted: str) -> bool:
    """Whether the kernels have the derivatives of these tensors of a side of queries: none, or the shift."""
    return wanted in ("", "shift")


def read_backward(
    d: Tensor,  # (B, H, N, Dv)
    q: Tensor,  # (B, H, N, D)
    kv: Tensor,  # (B, H, F, Dv)
    z: Tensor,  # (B, H, F)
    log_scale: Tensor,  # (B, H, F or 0)
    finish: Finish,
    side: Side,
    spec: Spec,
    wanted: str,
) -> list[Tensor | None] | None:
    """Derivatives of q, kv, z, the tensors of ``finish`` and those of ``side``; None where torch is to compute them.

    ``wanted`` names the tensors of the side that need one: only torch computes those of others than the shift.
    """
    given = [x for x in (kv, z, *finish[1:]) if x is not None]
    if not knows(wanted) or not takes(spec, side, d, q, *given) or not q.numel() or not kv.numel():
        return None
    batch, heads, length, head_dim = q.shape
    chunks, layout = pieces(length, batch * heads), layout_of(spec, side, head_dim)
    kv, z = floats(kv), floats(z)
    logs = floats(log_scale) if log_scale.shape[-1] else None
    constant_kv, constant_z, gamma, beta = (None if x is None else floats(x) for x in finish[1:])

    def new(x: Tensor | None, *shape: int) -> Tensor | None:
        return None if x is None else kv.new_empty(chunks, batch, heads, *shape)

    dq = torch.empty_like(q)
    sums = new(kv, *kv.shape[2:]), new(z, z.shape[2])
    finishing = (
        new(constant_kv, kv.shape[3]), new(constant_z), new(gamma), new(beta),
    )  # fmt: skip
    of_shift = kv.new_zeros(chunks, batch, heads, head_dim) if wanted else None
    run(
        "maclin_read_backward",
        _ReadBackward(
            ctypes.sizeof(_ReadBackward), batch, heads, length, kv.shape[3], chunks, layout.struct,
            array_of(q), array_of(d), array_of(dq), pointer(kv), pointer(z), pointer(logs), finish.floor,
            pointer(constant_kv), pointer(constant_z), pointer(gamma), pointer(beta),
            *(pointer(x) for x in (*sums, *finishing, of_shift)),
        ),
    )  # fmt: skip
    found = [None if x is None else x[0] if chunks == 1 else x.sum(0) for x in (*sums, *finishing)]
    per_head = [None if x is None else x.sum(0) for x in found[4:]]
    return [dq, *found[:4], *per_head, *Side(shift=None if of_shift is None else of_shift.sum((0, 1)))]


def accumulate_backward(
    dkv: Tensor,  # (B, Hk, F, Dv)
    dz: Tensor,  # (B, Hk, F)
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    log_scale: Tensor,
    side: Side,
    spec: Spec,
    wanted: str,
) -> tuple[Tensor, Tensor] | None:
    """Derivatives of k and v; None where torch is to compute them, as where tensors of the side are ``wanted``."""
    if wanted or not takes_keys(k, v, key_mask, side, spec) or not takes(spec, side, dkv, dz):
        return None
    batch, heads, length, head_dim = k.shape
    dkv, dz, log_scale = floats(dkv), floats(dz), floats(log_scale)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    run(
        "maclin_accumulate_backward",
        _AccumulateBackward(
            ctypes.sizeof(_AccumulateBackward), batch, heads, length, v.shape[3], pieces(length, batch * heads),
            layout_of(spec, side, head_dim).struct, array_of(k), array_of(v), array_of(dk), array_of(dv),
            pointer(key_mask), *((0, 0) if key_mask is None else key_mask.stride()),
            pointer(dkv), pointer(dz), pointer(log_scale),
        ),
    )  # fmt: skip
    return dk, dv
