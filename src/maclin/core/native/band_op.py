"""The custom operator of the hybrid, as those of ``core.fast``.

maclin::band   queries, keys, values and the sums of far keys -> out and the sums after the call
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fast.maps import Maps
from ..fast.memory import like_queries
from ..fast.ops import runs_directly, some
from ..fast.spec import Side, spec_of
from . import band as _native
from .band import Derivatives, Problem
from .calls import takes_keys
from .layout import TYPES, takes
from .library import library

_SIDE = len(Side._fields)
_TENSORS = 16  # of a problem, before its sides
_Maybe = Tensor | None


def takes_band(maps: Maps, q: Tensor, k: Tensor, v: Tensor, key_mask: _Maybe, *, apart: bool) -> bool:
    """Whether the kernels compute this: features that are no logarithms, and derivatives that they know.

    Of a map's own tensors these are the weights, ppSBN's second half, and a shift of queries that are not normalised,
    where the exponents come ``apart`` from q and k.
    """
    if maps.key_spec.family != "product" or v.dtype != q.dtype or not q.numel() or not k.numel() or not v.numel():
        return False
    if torch.is_grad_enabled() and _learns(maps, apart):
        return False
    if torch.compiler.is_compiling():
        return _ready() and all(x.device.type == "cpu" and x.dtype in TYPES for x in (q, k, v))
    return takes_keys(k, v, key_mask, maps.key, maps.key_spec) and takes(maps.query_spec, maps.query, q)


def _learns(maps: Maps, apart: bool) -> bool:
    """Whether a tensor of the map is trained whose derivative is not among those of the kernels."""
    of_queries = maps.query._replace(shift=None) if apart and not maps.query_spec.norm else maps.query
    return any(x is not None and x.requires_grad for x in (*of_queries, *maps.key))


def _ready() -> bool:
    """For what is compiled in this process; a program that is exported may run without the kernels."""
    return library() is not None and not torch.compiler.is_exporting()


# torch.compiler.assume_constant_result sets this, and imports the whole compiler for it
_ready._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@torch.library.custom_op("maclin::band", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    lift: Tensor | None,
    weights: Tensor | None,
    kv: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    sink_right: Tensor | None,
    sink_v: Tensor | None,
    sink_mask: Tensor | None,
    sink_position: Tensor | None,
    q_projection: Tensor | None,
    q_offset: Tensor | None,
    q_index: Tensor | None,
    q_shift: Tensor | None,
    q_mean: Tensor | None,
    q_variance: Tensor | None,
    k_projection: Tensor | None,
    k_offset: Tensor | None,
    k_index: Tensor | None,
    k_shift: Tensor | None,
    k_mean: Tensor | None,
    k_variance: Tensor | None,
    query_spec: str,
    key_spec: str,
    scale: float,
    floor: float,
    window: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (
        q, k, v, key_mask, left, right, lift, weights, kv, z, gamma, beta, sink_right, sink_v, sink_mask, sink_position,
        q_projection, q_offset, q_index, q_shift, q_mean, q_variance,
        k_projection, k_offset, k_index, k_shift, k_mean, k_variance,
    )  # fmt: skip
    return _native.band(_problem(tensors, query_spec, key_spec, scale, floor, window, causal))


def _problem(
    tensors: tuple[_Maybe, ...], query_spec: str, key_spec: str, scale: float, floor: float, window: int, causal: bool
) -> Problem:
    own, sides = tensors[:_TENSORS], tensors[_TENSORS:]
    maps = Side(*sides[:_SIDE]), Side(*sides[_SIDE:]), spec_of(query_spec), spec_of(key_spec)
    return Problem._make((*own, *maps, scale, floor, window, causal))


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    kv, z, causal = rest[5], rest[6], rest[-1]
    out = like_queries(q, v.shape[3])
    if not causal:
        return out, kv.new_empty(0, dtype=torch.float32), kv.new_empty(0, dtype=torch.float32)
    return out, torch.empty_like(kv, dtype=torch.float32), torch.empty_like(z, dtype=torch.float32)


@torch.library.custom_op("maclin::band_backward", mutates_args=())
def _backward_op(
    d: Tensor,
    dkv: Tensor,
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    lift: Tensor | None,
    weights: Tensor | None,
    kv: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    sink_right: Tensor | None,
    sink_v: Tensor | None,
    sink_mask: Tensor | None,
    sink_position: Tensor | None,
    q_projection: Tensor | None,
    q_offset: Tensor | None,
    q_index: Tensor | None,
    q_shift: Tensor | None,
    q_mean: Tensor | None,
    q_variance: Tensor | None,
    k_projection: Tensor | None,
    k_offset: Tensor | None,
    k_index: Tensor | None,
    k_shift: Tensor | None,
    k_mean: Tensor | None,
    k_variance: Tensor | None,
    query_spec: str,
    key_spec: str,
    scale: float,
    floor: float,
    window: int,
    causal: bool,
    wanted: str,
) -> list[Tensor]:
    tensors = (
        q, k, v, key_mask, left, right, lift, weights, kv, z, gamma, beta, sink_right, sink_v, sink_mask, sink_position,
        q_projection, q_offset, q_index, q_shift, q_mean, q_variance,
        k_projection, k_offset, k_index, k_shift, k_mean, k_variance,
    )  # fmt: skip
    problem = _problem(tensors, query_spec, key_spec, scale, floor, window, causal)
    found = _native.band_backward(problem, d, dkv, dz, wanted)
    shift = None
    if "shift" in wanted.split():
        shift = -found.q.sum((0, 2), dtype=torch.float32)
    return [*(some(x, q) for x in found), q.new_empty(0, dtype=torch.float32) if shift is None else shift]


@_backward_op.register_fake
def _(d: Tensor, dkv: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    tensors: dict[str, _Maybe] = dict(zip(_BESIDE, rest, strict=False))
    wanted = rest[-1].split()
    found = [torch.empty_like(x) for x in (q, k, v)]
    for name in Derivatives._fields[3:]:
        x = tensors[name]
        if x is None or (name in ("lift", "weights") and name not in wanted):
            found.append(q.new_empty(0))
        else:
            found.append(torch.empty_like(x, dtype=x.dtype if name in ("left", "right") else torch.float32))
    shape = (q.shape[1], q.shape[3]) if "shift" in wanted else (0,)
    return [*found, q.new_empty(shape, dtype=torch.float32)]


_BESIDE = (
    "key_mask", "left", "right", "lift", "weights", "kv", "z", "gamma", "beta", "sink_right", "sink_v",
)  # fmt: skip
"""Tensors of the operator behind v, as far as they have derivatives."""


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + 2 * _SIDE])
    ctx.numbers = inputs[_TENSORS + 2 * _SIDE :]


def _vjp(ctx: Any, d: Tensor, dkv: Tensor, dz: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    names = {"lift": 6, "weights": 7, "shift": _TENSORS + 3}
    wanted = " ".join(name for name, at in names.items() if ctx.needs_input_grad[at])
    *found, shift = torch.ops.maclin.band_backward(d, dkv, dz, *tensors, *ctx.numbers, wanted)
    of = dict(zip(Derivatives._fields, found, strict=True))

    def of_input(name: str, x: _Maybe) -> _Maybe:
        made = of.get(name)
        return None if x is None or made is None or not made.numel() else made.to(x.dtype)

    fields = Problem._fields[:_TENSORS]
    own = [of_input(name, x) for name, x in zip(fields, tensors, strict=False)]
    sides: list[_Maybe] = [None] * (2 * _SIDE)
    of_shift = tensors[_TENSORS + 3]
    if of_shift is not None and shift.numel():
        sides[3] = shift.to(of_shift.dtype)
    return (*own, *sides, *(None for _ in ctx.numbers))


_op.register_autograd(_vjp, setup_context=_setup)


def band(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Out (B, H, N, Dv) in q's dtype, and the sums after the call where it is causal; differentiable."""
    tensors = (*problem[:_TENSORS], *problem.query, *problem.key)
    if runs_directly(*tensors):
        return _native.band(problem)
    specs = problem.query_spec.code, problem.key_spec.code
    return torch.ops.maclin.band(*tensors, *specs, problem.scale, problem.floor, problem.window, problem.causal)
