"""The custom operator of causal attention, as those of ``ops``.

maclin::causal   queries, keys, values and the sums before them -> out and the sums after them
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import calls as native
from ..native import causal_derivatives as derivatives
from .causal import Problem
from .causal import causal as _causal
from .causal_backward import causal_backward
from .memory import like_queries
from .ops import fake_side, or_none, runs_directly, some, wanted_of
from .read import Finish
from .spec import Side, spec_of
from .sums import accumulation_dtype, computed_in

_SIDE = len(Side._fields)
_Maybe = Tensor | None


def _problem(tensors: tuple[_Maybe, ...], query_spec: str, key_spec: str, floor: float) -> Problem:
    q, k, v, key_mask, weights, kv, z, gamma, beta, *sides = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    assert kv is not None
    assert z is not None
    return Problem(
        q,
        k,
        v,
        key_mask,
        weights,
        kv,
        z,
        Finish(floor, gamma=gamma, beta=beta),
        Side(*sides[:_SIDE]),
        Side(*sides[_SIDE:]),
        spec_of(query_spec),
        spec_of(key_spec),
    )


def _computed(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return native.causal(problem, problem.q.dtype) or _causal(problem, problem.q.dtype)


@torch.library.custom_op("maclin::causal", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    weights: Tensor | None,
    kv: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
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
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (
        q, k, v, key_mask, weights, kv, z, gamma, beta, q_projection, q_offset, q_index, q_shift, q_mean, q_variance,
        k_projection, k_offset, k_index, k_shift, k_mean, k_variance,
    )  # fmt: skip
    return _computed(_problem(tensors, query_spec, key_spec, floor))


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: _Maybe, weights: _Maybe, kv: Tensor, z: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return like_queries(q, v.shape[3]), *(
        torch.empty_like(x, dtype=accumulation_dtype(computed_in(q))) for x in (kv, z)
    )


@torch.library.custom_op("maclin::causal_backward", mutates_args=())
def _backward_op(
    d: Tensor,
    dkv: Tensor,
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    weights: Tensor | None,
    kv: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
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
    floor: float,
    q_wanted: str,
    k_wanted: str,
) -> list[Tensor]:
    tensors = (
        q, k, v, key_mask, weights, kv, z, gamma, beta, q_projection, q_offset, q_index, q_shift, q_mean, q_variance,
        k_projection, k_offset, k_index, k_shift, k_mean, k_variance,
    )  # fmt: skip
    problem = _problem(tensors, query_spec, key_spec, floor)
    found = derivatives.causal_backward(d, dkv, dz, problem, q_wanted, k_wanted)
    if found is None:
        found = causal_backward(d, dkv, dz, problem, frozenset(q_wanted.split()), frozenset(k_wanted.split()))
    return [some(x, q) for x in (*found[:-2], *found.query, *found.key)]


@_backward_op.register_fake
def _(d: Tensor, dkv: Tensor, dz: Tensor, *rest: Any) -> list[Tensor]:
    *tensors, _query_spec, _key_spec, _floor, q_wanted, k_wanted = rest
    q, k, v, _, weights, kv, z, gamma, beta, *sides = tensors
    wide = accumulation_dtype(computed_in(q))
    like = [q.new_empty(0) if x is None else torch.empty_like(x, dtype=wide) for x in (weights, kv, z, gamma, beta)]
    return [
        *(torch.empty_like(x) for x in (q, k, v)),
        *like,
        *fake_side(Side(*sides[:_SIDE]), q_wanted, q),
        *fake_side(Side(*sides[_SIDE:]), k_wanted, q),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.query_spec, ctx.key_spec, ctx.floor = inputs
    ctx.save_for_backward(*tensors)


def _vjp(ctx: Any, d: Tensor, dkv: Tensor, dz: Tensor) -> tuple[_Maybe, ...]:
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[9 : 9 + 2 * _SIDE]
    q_wanted = " ".join(wanted_of(Side(*tensors[9 : 9 + _SIDE]), needs[:_SIDE]))
    k_wanted = " ".join(wanted_of(Side(*tensors[9 + _SIDE :]), needs[_SIDE:]))
    dq, dk, dv, *rest = torch.ops.maclin.causal_backward(
        d, dkv, dz, *tensors, ctx.query_spec, ctx.key_spec, ctx.floor, q_wanted, k_wanted
    )
    others = [or_none(x, found) for x, found in zip(tensors[4:], rest, strict=True)]
    return (dq, dk, dv, None, *others, None, None, None)


_op.register_autograd(_vjp, setup_context=_setup)


def causal(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See ``causal.causal``, in q's dtype; differentiable."""
    finish = problem.finish
    tensors = (*problem[:7], finish.gamma, finish.beta, *problem.query, *problem.key)
    if runs_directly(*tensors):
        return _computed(problem)
    return torch.ops.maclin.causal(*tensors, problem.query_spec.code, problem.key_spec.code, finish.floor)
