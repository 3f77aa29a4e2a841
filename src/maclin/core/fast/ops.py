"""The custom operators: tensors and numbers only, with shapes for tracing and gradients by recomputation.

    maclin::accumulate   keys and values -> sums
    maclin::read         queries and sums -> out

So that ``torch.compile(fullgraph=True)``, ``torch.export`` and activation checkpointing see one operation, and that
nothing of size tokens x features is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import calls as native
from ..native import derivatives
from . import read as _read
from . import sums as _sums
from .memory import like_queries
from .read import Finish
from .spec import Side, Spec, spec_of

_SIDE = len(Side._fields)
_Maybe = Tensor | None


def some(x: _Maybe, like: Tensor) -> Tensor:
    """The tensor, or an empty one: operators cannot return None."""
    return like.new_empty(0) if x is None else x


def or_none(x: _Maybe, found: _Maybe) -> _Maybe:
    """A derivative in the dtype of its tensor."""
    return None if x is None or found is None or not found.numel() else found.to(x.dtype)


def wanted_of(x: Side, needs: tuple[bool, ...]) -> list[str]:
    """Names of the tensors of a side that need a derivative."""
    return [name for name, t, need in zip(Side._fields, x, needs, strict=True) if need and t is not None]


def _accumulated(k: Tensor, v: Tensor, key_mask: _Maybe, side: Side, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    found = native.accumulate(k, v, key_mask, side, spec)
    return found or _sums.accumulate(k, v, key_mask, side, spec)


def _reading(q: Tensor, kv: Tensor, z: Tensor, log_scale: Tensor, finish: Finish, side: Side, spec: Spec) -> Tensor:
    found = native.read(q, kv, z, log_scale, finish, side, spec, q.dtype)
    return _read.read(q, kv, z, log_scale, finish, side, spec, q.dtype) if found is None else found


@torch.library.custom_op("maclin::accumulate", mutates_args=())
def _accumulate(
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    offset: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _accumulated(k, v, key_mask, Side(projection, offset, index, shift, mean, variance), spec_of(spec))


@_accumulate.register_fake
def _(
    k: Tensor,
    v: Tensor,
    key_mask: _Maybe,
    projection: _Maybe,
    offset: _Maybe,
    index: _Maybe,
    shift: _Maybe,
    mean: _Maybe,
    variance: _Maybe,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    found = spec_of(spec)
    total = num_features(found, k.shape[3], projection)
    like = v.new_empty(0, dtype=_sums.accumulation_dtype(v.dtype))
    shape = (*k.shape[:2], total)
    return (
        like.new_empty(*shape, v.shape[3]),
        like.new_empty(shape),
        like.new_empty(shape if found.log_domain else (*k.shape[:2], 0)),
    )


@torch.library.custom_op("maclin::accumulate_backward", mutates_args=())
def _accumulate_backward(
    dkv: Tensor,
    dz: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    log_scale: Tensor,
    projection: Tensor | None,
    offset: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    spec: str,
    wanted: str,
) -> list[Tensor]:
    side = Side(projection, offset, index, shift, mean, variance)
    found = derivatives.accumulate_backward(dkv, dz, k, v, key_mask, log_scale, side, spec_of(spec), wanted)
    if found is not None:
        return [*found, *(k.new_empty(0) for _ in side)]
    dk, dv, deriver = _sums.accumulate_backward(
        dkv, dz, k, v, key_mask, log_scale, side, spec_of(spec), frozenset(wanted.split())
    )
    return [dk, dv, *(some(deriver.derivative(name), dk) for name in Side._fields)]


@_accumulate_backward.register_fake
def _(
    dkv: Tensor,
    dz: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: _Maybe,
    log_scale: Tensor,
    projection: _Maybe,
    offset: _Maybe,
    index: _Maybe,
    shift: _Maybe,
    mean: _Maybe,
    variance: _Maybe,
    spec: str,
    wanted: str,
) -> list[Tensor]:
    side = Side(projection, offset, index, shift, mean, variance)
    return [torch.empty_like(k), torch.empty_like(v), *fake_side(side, wanted, k)]


def fake_side(side: Side, wanted: str, like: Tensor) -> list[Tensor]:
    """Shapes of the derivatives of a side."""
    names = wanted.split()
    return [
        torch.empty_like(x, dtype=_sums.computed_in(like)) if name in names and x is not None else like.new_empty(0)
        for name, x in zip(Side._fields, side, strict=True)
    ]


def _accumulate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, key_mask, *side, spec = inputs
    ctx.save_for_backward(k, v, key_mask, output[2], *side)
    ctx.spec = spec
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(True)


def _accumulate_vjp(ctx: Any, dkv: Tensor, dz: Tensor, _: Any) -> tuple[_Maybe, ...]:
    k, v, key_mask, log_scale, *tensors = ctx.saved_tensors
    side = Side(*tensors)
    wanted = " ".join(wanted_of(side, ctx.needs_input_grad[3 : 3 + _SIDE]))
    dk, dv, *found = torch.ops.maclin.accumulate_backward(dkv, dz, k, v, key_mask, log_scale, *side, ctx.spec, wanted)
    return (dk, dv, None, *(or_none(x, d) for x, d in zip(side, found, strict=True)), None)


_accumulate.register_autograd(_accumulate_vjp, setup_context=_accumulate_setup)


@torch.library.custom_op("maclin::read", mutates_args=())
def _read_all(
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    log_scale: Tensor,
    constant_kv: Tensor | None,
    constant_z: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    projection: Tensor | None,
    offset: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    spec: str,
    floor: float,
) -> Tensor:
    side = Side(projection, offset, index, shift, mean, variance)
    finish = Finish(floor, constant_kv, constant_z, gamma, beta)
    return _reading(q, kv, z, log_scale, finish, side, spec_of(spec))


@_read_all.register_fake
def _(q: Tensor, kv: Tensor, *_: Any) -> Tensor:
    return like_queries(q, kv.shape[3])


@torch.library.custom_op("maclin::read_backward", mutates_args=())
def _read_backward(
    d: Tensor,
    out: Tensor,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    log_scale: Tensor,
    constant_kv: Tensor | None,
    constant_z: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    projection: Tensor | None,
    offset: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    spec: str,
    floor: float,
    wanted: str,
) -> list[Tensor]:
    side = Side(projection, offset, index, shift, mean, variance)
    finish = Finish(floor, constant_kv, constant_z, gamma, beta)
    by_kernels = derivatives.read_backward(d, q, kv, z, log_scale, finish, side, spec_of(spec), wanted)
    if by_kernels is not None:
        return [some(x, q) for x in by_kernels]
    found = _read.read_backward(d, q, kv, z, log_scale, finish, side, spec_of(spec), frozenset(wanted.split()), out)
    return [
        *(some(x, q) for x in found[:-1]),
        *(some(found.deriver.derivative(name), q) for name in Side._fields),
    ]


@_read_backward.register_fake
def _(
    d: Tensor,
    out: Tensor,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    log_scale: Tensor,
    constant_kv: _Maybe,
    constant_z: _Maybe,
    gamma: _Maybe,
    beta: _Maybe,
    projection: _Maybe,
    offset: _Maybe,
    index: _Maybe,
    shift: _Maybe,
    mean: _Maybe,
    variance: _Maybe,
    spec: str,
    floor: float,
    wanted: str,
) -> list[Tensor]:
    side = Side(projection, offset, index, shift, mean, variance)
    dtype = _sums.accumulation_dtype(_sums.computed_in(q))
    like = [
        q.new_empty(0) if x is None else torch.empty_like(x, dtype=dtype)
        for x in (constant_kv, constant_z, gamma, beta)
    ]
    return [
        torch.empty_like(q),
        torch.empty_like(kv, dtype=dtype),
        torch.empty_like(z, dtype=dtype),
        *like,
        *fake_side(side, wanted, q),
    ]


def _read_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, spec, floor = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.spec, ctx.floor = spec, floor


def _read_vjp(ctx: Any, d: Tensor) -> tuple[_Maybe, ...]:
    out, *tensors = ctx.saved_tensors
    side = Side(*tensors[8:])
    wanted = " ".join(wanted_of(side, ctx.needs_input_grad[8 : 8 + _SIDE]))
    dq, dkv, dz, *rest = torch.ops.maclin.read_backward(d, out, *tensors, ctx.spec, ctx.floor, wanted)
    others = (or_none(x, found) for x, found in zip(tensors[4:], rest, strict=True))
    return (dq, dkv.to(tensors[1].dtype), dz.to(tensors[2].dtype), None, *others, None, None)


_read_all.register_autograd(_read_vjp, setup_context=_read_setup)


def num_features(spec: Spec, head_dim: int, projection: Tensor | None) -> int:
    """F."""
    if spec.family == "product":
        return spec.products + (head_dim if spec.linear else 0)
    width = head_dim if projection is None else projection.shape[-1]
    return 2 * width if spec.family == "fourier" else width


def accumulate(k: Tensor, v: Tensor, key_mask: Tensor | None, side: Side, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sums.accumulate``; differentiable."""
    if runs_directly(k, v, *side):
        return _accumulated(k, v, key_mask, side, spec)
    return torch.ops.maclin.accumulate(k, v, key_mask, *side, spec.code)


def read(q: Tensor, kv: Tensor, z: Tensor, log_scale: Tensor, finish: Finish, side: Side, spec: Spec) -> Tensor:
    """See ``read.read``, in q's dtype; differentiable."""
    if runs_directly(q, kv, z, *finish[1:], *side):
        return _reading(q, kv, z, log_scale, finish, side, spec)
    return torch.ops.maclin.read(q, kv, z, log_scale, *finish[1:], *side, spec.code, finish.floor)


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether nobody traces and nobody differentiates, so that the operator's own costs can be saved."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    return all(
        x is None or (type(x) in _PLAIN and x.device.type != "meta" and not (grad and x.requires_grad)) for x in tensors
    )


_PLAIN = (Tensor, torch.nn.Parameter)
