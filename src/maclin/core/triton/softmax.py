"""Softmax features (Efficient Attention): softmax over the channels of q, and of k over positions, per channel.

The features of a key are exp(k), with M = D and a running maximum per channel. Dividing kv by z turns them into a
softmax over positions, and leaves a denominator of sum_m exp(q_m), which makes that of the query. Causal, z is another
one for every query: its logarithm is taken by torch into the query's, a tensor of q's size, and the denominator is 1.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import torch
from torch import Tensor

from . import contraction
from .causal import Gradients
from .causal import causal as any_causal
from .causal import causal_backward as any_causal_backward
from .contraction import Reading, Sums, accumulate, accumulate_backward
from .device import CHANNEL
from .launch import Blocks, FeatureMap

_NOTHING = -1e30  # a logarithm of nothing whose gradient is a number


def softmax(
    head_dim: int,
    scale: float = 1.0,  # of q; keys have 1
) -> FeatureMap:
    """The feature map whose logarithms are the channels themselves."""
    return FeatureMap(CHANNEL, head_dim, square=scale)


def read(
    f: FeatureMap, q: Tensor, sums: Sums, dtype: torch.dtype, finish: bool = True, blocks: Blocks | None = None
) -> Reading:
    """What queries read of a softmax over positions, per channel."""
    return contraction.read(f, q, over_positions(sums), dtype, finish=finish, blocks=blocks)


def read_backward(
    f: FeatureMap, q: Tensor, sums: Sums, reading: Reading, grad: Tensor, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a finished reading: of q, kv and z."""
    normalised = over_positions(sums)
    dq, dkv, _ = contraction.read_backward(f, q, normalised, reading, grad, blocks=blocks)
    dkv = dkv / not_zero(sums[1])[..., None]
    return dq, dkv, -(dkv * normalised[0]).sum(-1)


def over_positions(sums: Sums) -> Sums:
    """Sums whose kv is divided by z, to be read by the exponentials of a query; nothing where no key is attended to."""
    kv, z, log_scale, count = sums
    attends = (count > 0).float()[:, None, None].expand_as(z)
    return kv / not_zero(z)[..., None], attends, torch.zeros_like(log_scale), count


def not_zero(z: Tensor) -> Tensor:
    """Z, with 1 where it is 0."""
    return torch.where(z == 0, torch.ones_like(z), z)


def causal(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    sums: Sums | None = None,
    blocks: Blocks | None = None,
) -> tuple[Reading, Sums]:
    """What queries read of a softmax over the positions up to their own, per channel, and the sums of all keys."""
    prefix = k.shape[2] - q.shape[2]
    if prefix:
        head = None if key_mask is None else key_mask[:, :prefix]
        sums = accumulate(f_k, k[:, :, :prefix], v[:, :, :prefix], head, sums, blocks)
        k, v = k[:, :, prefix:], v[:, :, prefix:]
        key_mask = None if key_mask is None else key_mask[:, prefix:]
    logs = query_logs(f_q, q, k, key_mask, sums)
    return any_causal(f_k, f_k, logs, k, v, key_mask, sums, unit=True, blocks=blocks)


def causal_backward(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    grad: Tensor,
    key_mask: Tensor | None = None,
    sums: Sums | None = None,
    grad_sums: tuple[Tensor, Tensor] | None = None,
    log_scale: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Gradients:
    """Gradients of q, k, v and of the sums that ``causal`` started from, as ``causal.causal_backward``."""
    prefix = k.shape[2] - q.shape[2]
    if prefix:
        head, tail = (None, None) if key_mask is None else (key_mask[:, :prefix], key_mask[:, prefix:])
        first = (k[:, :, :prefix], v[:, :, :prefix])
        start = accumulate(f_k, *first, head, sums, blocks)
        rest = (k[:, :, prefix:], v[:, :, prefix:])
        dq, dk, dv, of_start = causal_backward(
            f_q, f_k, q, *rest, reading, grad, tail, start, grad_sums, log_scale, blocks
        )
        assert of_start is not None
        dk_first, dv_first = accumulate_backward(f_k, *first, start[2], *of_start, key_mask=head, blocks=blocks)
        of_sums = None if sums is None else contraction.rescaled(of_start, sums[2], start[2])
        return dq, torch.cat([dk_first, dk], 2), torch.cat([dv_first, dv], 2), of_sums
    q_leaf, k_leaf = q.detach().requires_grad_(), k.detach().requires_grad_()
    z_leaf = None if sums is None else sums[1].detach().requires_grad_()
    with torch.enable_grad():
        known = None if sums is None or z_leaf is None else (sums[0], z_leaf, sums[2], sums[3])
        logs = query_logs(f_q, q_leaf, k_leaf, key_mask, known)
    of_logs, dk, dv, of_sums = any_causal_backward(
        f_k,
        f_k,
        logs.detach(),
        k,
        v,
        reading,
        grad,
        key_mask,
        sums,
        grad_sums,
        log_scale,
        unit=True,
        blocks=blocks,
    )
    leaves = [x for x in (q_leaf, k_leaf, z_leaf) if x is not None]
    dq, more, *of_z = torch.autograd.grad(logs, leaves, of_logs)
    if of_sums is not None:
        of_sums = (of_sums[0], of_sums[1] + of_z[0])
    return dq, dk + more, dv, of_sums


def query_logs(f: FeatureMap, q: Tensor, k: Tensor, key_mask: Tensor | None, sums: Sums | None) -> Tensor:
    """log softmax(q) less the logarithm of each channel's sum over the keys up to each query, (B, H, N, D), float32."""
    log_k = k.float()
    seen = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    log_k = log_k.masked_fill(~seen[:, None, :, None], _NOTHING)
    before = torch.full_like(log_k[:, :, :1], _NOTHING)
    count = seen.cumsum(-1)
    if sums is not None:
        _, z, log_scale, known = sums
        nothing = z == 0
        logs = z.masked_fill(nothing, 1.0).log() + log_scale.masked_fill(nothing, 0.0)
        before = logs.masked_fill(nothing, _NOTHING)[:, :, None].float()
        count = count + known[:, None]
    log_z = torch.cat([before, log_k], 2).logcumsumexp(2)[:, :, 1:]
    log_q = torch.log_softmax(q.float() * f.square, -1) - log_z.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return log_q.masked_fill((count == 0)[:, None, :, None], -torch.inf)
