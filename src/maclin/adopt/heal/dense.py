"""Hybrid attention with all of its weights in memory: the same numbers, and much faster to train at short lengths.

The hybrid walks along the sequence in blocks, which is what makes it linear and what costs most of the time where
sequences are short. While a model is healed, calls of few enough tokens make the N x S weights instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maclin.core.algebra import grouped, per_key_head, top_of, wide
from maclin.core.compose.hybrid import Hybrid
from maclin.core.mechanisms.base import State

DENSE_TOKENS = 384
"""Queries and keys up to which it is done: at 256 it takes a third of the time of the blocks, at 512 it is no gain."""
_NUMBERS = 1 << 22  # of weights beyond which they are made again in the backward pass


@contextmanager
def dense_hybrids(root: nn.Module, tokens: int = DENSE_TOKENS) -> Iterator[None]:
    """Context in which hybrids of positive features run so, where a call has at most so many queries and keys."""
    found = [m for m in root.modules() if isinstance(m, Hybrid) and _is_positive(m)]
    for mechanism in found:
        vars(mechanism).update(
            _bidirectional=partial(_bidirectional, mechanism, tokens), _causal=partial(_causal, mechanism, tokens)
        )
    try:
        yield
    finally:
        for mechanism in found:
            for name in ("_bidirectional", "_causal"):
                vars(mechanism).pop(name)


def dense_attention(
    mechanism: Hybrid, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """What ``mechanism`` gives, from the N x S weights.

    Args:
        mechanism: a hybrid whose linear mechanism has logarithms for features.
        q: (B, H, N, D).
        k: (B, Hk, S, D).
        v: (B, Hk, S, Dv).
        key_mask: (B, S) bool, True = attend.
        scale: of the logits.
        is_causal: whether it is used so.
    """
    features, exponent = mechanism._maps(scale)
    length, total = q.shape[2], k.shape[2]
    rows = torch.arange(length, device=q.device)[:, None] + total - length
    columns = torch.arange(total, device=q.device)[None]
    ahead = 0 if is_causal else mechanism.window
    near = (columns >= rows - mechanism.window) & (columns <= rows + ahead)
    allowed = (columns <= rows if is_causal else torch.ones_like(near))[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    log_q, log_k = features.query(wide(q)), features.key(wide(k))
    if key_mask is not None:
        log_k = log_k.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    top_k = top_of(log_k, -2)  # of each feature
    log_q = log_q + grouped(top_k, q.shape[1])[:, :, None]
    shift = top_of(log_q, -1)[..., None]
    far = per_key_head((log_q - shift).exp(), (log_k - top_k[:, :, None]).exp().mT)
    if exponent.left_out is not None:
        shift = shift + exponent.left_out(wide(q))[..., None]
    if mechanism.log_balance is not None:
        shift = shift + mechanism.log_balance.to(shift.dtype)[:, None, None]
    logits = per_key_head(exponent.query(wide(q)), exponent.key(wide(k)).mT)
    logits = logits.masked_fill(~(near & allowed), -torch.inf)
    top = torch.maximum(logits.detach().amax(-1, keepdim=True), shift.detach())
    weights = torch.where(near, (logits - top).exp(), far * (shift - top).exp()) * allowed
    out = per_key_head(weights, wide(v))
    denominator = weights.sum(-1, keepdim=True)
    return (out / denominator.clamp_min(torch.finfo(out.dtype).tiny)).to(v.dtype)


def _is_positive(mechanism: Hybrid) -> bool:
    return not mechanism.sinks and mechanism.linear.features(mechanism._scale(None)).log_domain


def _fits(tokens: int, q: Tensor, k: Tensor) -> bool:
    return 0 < q.shape[2] <= tokens and 0 < k.shape[2] <= tokens


def _dense(
    mechanism: Hybrid, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    if torch.is_grad_enabled() and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > _NUMBERS:
        found = checkpoint(dense_attention, mechanism, q, k, v, key_mask, scale, is_causal, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found
    return dense_attention(mechanism, q, k, v, key_mask, scale, is_causal)


def _bidirectional(
    mechanism: Hybrid, tokens: int, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    if not _fits(tokens, q, k):
        return Hybrid._bidirectional(mechanism, q, k, v, key_mask, scale)
    return _dense(mechanism, q, k, v, key_mask, scale, False)


def _causal(
    mechanism: Hybrid,
    tokens: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    state: State | None,
) -> tuple[Tensor, State]:
    if state is not None or not _fits(tokens, q, k):
        return Hybrid._causal(mechanism, q, k, v, key_mask, scale, state)
    return _dense(mechanism, q, k, v, key_mask, scale, True), ()
