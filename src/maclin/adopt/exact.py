"""Exact attention in blocks of queries, with what its weights look like; and the uniform baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maclin.adopt.hosts.base import AttentionCall

_BLOCK_NUMBERS = 2**22
"""Numbers of the attention matrix that exist at once: 16 MiB in float32, small enough for most caches."""


@dataclass(frozen=True)
class ExactAttention:
    """softmax(scale q kᵀ) v, and statistics of each row of its weights.

    Shape:
        out (B, H, N, Dv); entropy, logit_std (B, H, N), in nats and in units of the scaled logits;
        attended (B, N): keys that each query may attend to.
    """

    out: Tensor
    entropy: Tensor
    logit_std: Tensor
    attended: Tensor


def heads_repeated(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in at least float32, with as many heads of k and v as of q."""
    groups = call.q.shape[1] // call.k.shape[1]
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (call.k, call.v))
    return call.q.to(dtype), k, v


def actual_scale(call: AttentionCall) -> float:
    """The factor of the logits in the host."""
    return call.q.shape[-1] ** -0.5 if call.scale is None else call.scale


def allowed_keys(call: AttentionCall, start: int, stop: int) -> Tensor:
    """(B, stop - start, S) bool: what the queries from ``start`` to ``stop`` may attend to."""
    n, s = call.q.shape[2], call.k.shape[2]
    keys = torch.arange(s, device=call.q.device)
    rows = torch.arange(start, stop, device=call.q.device) + s - n
    allowed = (
        keys[None, :] <= rows[:, None] if call.is_causal else torch.ones_like(rows[:, None] + keys, dtype=torch.bool)
    )
    allowed = allowed[None].expand(call.q.shape[0], -1, -1)
    return allowed if call.key_mask is None else allowed & call.key_mask[:, None, :]


def exact_attention(call: AttentionCall) -> ExactAttention:
    """Exact attention of a captured call, in float32 or better, a block of queries at a time."""
    q, k, v = heads_repeated(call)
    batch, heads, n, _ = q.shape
    q = q * actual_scale(call)
    block = max(1, _BLOCK_NUMBERS // max(1, batch * heads * k.shape[2]))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, n, block):
        allowed = allowed_keys(call, start, min(start + block, n))[:, None]
        logits = (q[:, :, start : start + block] @ k.transpose(-1, -2)).masked_fill_(~allowed, 0.0)
        attended = allowed.sum(-1)
        many = attended.clamp_min(1)
        mean = logits.sum(-1) / many
        std = (logits.square().sum(-1) / many - mean.square()).clamp_min(0.0).sqrt()
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        weights = weights.masked_fill_(attended[..., None] == 0, 0.0)  # a row that may attend to nothing
        entropy = torch.special.entr(weights).sum(-1)
        parts.append((weights @ v, entropy, std, attended[:, 0]))
    out, entropy, logit_std = (torch.cat([part[i] for part in parts], dim=2) for i in range(3))
    return ExactAttention(out, entropy, logit_std, torch.cat([part[3] for part in parts], dim=1))


def uniform_attention(call: AttentionCall) -> Tensor:
    """The average of the values that each query may attend to: (B, H, N, Dv)."""
    _, _, v = heads_repeated(call)
    n, s = call.q.shape[2], v.shape[2]
    weight = v.new_ones(v.shape[0], s) if call.key_mask is None else call.key_mask.to(v.dtype)
    v = v * weight[:, None, :, None]
    if call.is_causal:
        total, count = v.cumsum(2)[:, :, s - n :], weight.cumsum(1)[:, s - n :]
    else:
        total, count = v.sum(2, keepdim=True).expand(-1, -1, n, -1), weight.sum(1, keepdim=True).expand(-1, n)
    return total / count.clamp_min(1)[:, None, :, None]
