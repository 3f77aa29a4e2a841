"""Derivatives of causal attention by the compiled kernels, as the custom operator gives them."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from ..fast.causal import Problem
from ..fast.causal_backward import CausalDerivatives
from ..fast.spec import Side
from .calls import CausalStruct, causal_struct, floats, splits_of, sums_before, takes_causal
from .derivatives import knows
from .layout import ArrayStruct, array_of, pointer, run, takes

_NO_SIDE = Side()


class _CausalBackward(ctypes.Structure):
    _fields_ = [  # ``CausalBackward`` of causal_backward.h
        ("size", c_int64),
        ("of", CausalStruct),
        *((name, ArrayStruct) for name in ("d", "dq", "dk", "dv", "before")),
        *((name, c_void_p) for name in ("per_row", "of_weights", "of_shift", "of_gamma", "of_beta", "of_kv", "of_z")),
        *((name, c_void_p) for name in ("behind_kv", "behind_z", "first_kv", "first_z")),
    ]


def causal_backward(
    d: Tensor, dkv: Tensor, dz: Tensor, problem: Problem, q_wanted: str, k_wanted: str
) -> CausalDerivatives | None:
    """See ``fast.causal_backward``; None where torch is to compute them.

    ``q_wanted`` and ``k_wanted`` name the tensors of the maps that need a derivative: only torch computes those of
    others than the shift of the queries.
    """
    if not knows(q_wanted) or k_wanted or not takes_causal(problem, problem.q.dtype):
        return None
    if not takes(problem.query_spec, problem.query, d, dkv, dz):
        return None
    q, k, v, weights = problem.q, problem.k, problem.v, problem.weights
    batch, heads, length, _ = q.shape
    splits = splits_of(problem)
    kv, z = sums_before(problem, splits)
    held = [None if x is None else floats(x) for x in (weights, problem.finish.gamma, problem.finish.beta)]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    before = d if held[1] is None else kv.new_empty(batch, heads, length, v.shape[3])
    per_row = kv.new_empty(4, batch, heads, length)
    of_finish = [None if x is None else kv.new_zeros(splits, batch, *(x.shape or (heads,))) for x in held]
    of_shift = kv.new_zeros(splits, batch, heads, q.shape[3]) if q_wanted else None
    of_kv, of_z = (torch.empty_like(x) if splits > 1 else None for x in (kv, z))
    behind = [floats(x)[None] for x in (dkv, dz)]
    first = [torch.empty_like(kv), torch.empty_like(z)]
    of_tensors = (of_finish[0], of_shift, *of_finish[1:], of_kv, of_z, *behind, *first)
    arguments = _CausalBackward(
        ctypes.sizeof(_CausalBackward), causal_struct(problem, splits, kv, z, None, held),
        *(array_of(x) for x in (d, dq, dk, dv, before)), pointer(per_row), *(pointer(x) for x in of_tensors),
    )  # fmt: skip
    run("maclin_causal_queries", arguments)
    if of_kv is not None and of_z is not None:
        behind = [
            torch.cat([end, of.flip(0)[:-1]]).cumsum(0).flip(0).contiguous()
            for end, of in zip(behind, (of_kv, of_z), strict=True)
        ]
        arguments.behind_kv, arguments.behind_z = pointer(behind[0]), pointer(behind[1])
    run("maclin_causal_keys", arguments)
    of_weights, of_gamma, of_beta, of_shift = (None if x is None else x.sum((0, 1)) for x in (*of_finish, of_shift))
    of_queries = Side(shift=of_shift)
    return CausalDerivatives(
        dq, dk, dv, of_weights, first[0][0], first[1][0], of_gamma, of_beta, of_queries, _NO_SIDE
    )  # fmt: skip
