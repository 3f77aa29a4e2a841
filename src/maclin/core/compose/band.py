"""Keys near each query: exact weights, and what features give for the same pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra import per_key_head, top_of, whole_mask, wide
from ..contract import Features, Reading, Sums, linear_reading
from ..mechanisms.base import Exponent
from ..sinks import Sinks, sinks_seen

BLOCK = 64
"""Queries that share a stretch of keys: fewer, and the products are too small; more, and most pairs are masked."""


class Tokens(NamedTuple):
    """Keys in order, with their values, and which may be attended to."""

    k: Tensor  # (B, Hk, S, D)
    v: Tensor  # (B, Hk, S, Dv)
    mask: Tensor  # (B, S)

    @classmethod
    def of(cls, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tokens:
        """All keys, where there is no mask."""
        return cls(k, v, whole_mask(k, key_mask))

    def cut(self, start: int, stop: int) -> Tokens:
        """Those from start to stop; where there are none, masked zeros."""
        length = self.k.shape[2]
        at = slice(min(max(start, 0), length), max(min(stop, length), 0))
        missing = (max(min(-start, stop - start), 0), max(min(stop - length, stop - start), 0))
        parts = self.k[:, :, at], self.v[:, :, at], self.mask[:, at]
        if not any(missing):
            return Tokens(*parts)
        return Tokens(*(F.pad(x, missing if x.dim() == 2 else (0, 0, *missing)) for x in parts))

    def flipped(self) -> Tokens:
        """The last first."""
        return Tokens(self.k.flip(2), self.v.flip(2), self.mask.flip(1))

    def after(self, past: Tokens) -> Tokens:
        """Behind others."""
        return Tokens(*(torch.cat(pair, dim=-1 if pair[0].dim() == 2 else 2) for pair in zip(past, self, strict=True)))


def near_reading(q: Tensor, tokens: Tokens, back: int, ahead: int, exponent: Exponent) -> Reading:
    """What each query reads exactly: of the tokens from ``back`` before it to ``ahead`` behind it.

    Shape: q (B, H, n, D); n + back + ahead tokens, the first of them ``back`` before the first query.
    """
    k, v = exponent.key(wide(tokens.k)), wide(tokens.v)
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)[None]
    allowed = (columns >= rows) & (columns <= rows + back + ahead) & tokens.mask[:, None, None]
    return _exact_reading(q, k, v, allowed, exponent)


def sink_reading(q: Tensor, sinks: Sinks, first: int | None, exponent: Exponent) -> Reading:
    """What queries (B, H, n, D) read of the sinks; causal, the first query stands at position ``first``."""
    rows = None if first is None else torch.arange(first, first + q.shape[2], device=q.device)
    return _exact_reading(q, exponent.key(wide(sinks.k)), wide(sinks.v), sinks_seen(sinks, rows), exponent)


def _exact_reading(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, exponent: Exponent) -> Reading:
    """exp of the logits of q with keys that the exponent has mapped already."""
    logits = per_key_head(exponent.query(wide(q)), k.mT).masked_fill(~allowed, -torch.inf)
    top = top_of(logits, -1)
    weights = (logits - top[..., None]).exp()
    total = weights.sum(-1)
    return Reading(per_key_head(weights, v), total, total, top)


def banded_reading(
    q: Tensor,
    tokens: Tokens,
    window: int,
    sums: Sums,
    features: Features,
    exponent: Exponent,
    shift: Tensor | None,
) -> Reading:
    """What queries read exactly of the keys around them, and of all others through sums of all keys.

    numerator = exp(shift) (phi_q kv - sum_near <phi_q, phi_k> v) + sum_near exp(t) v, and so the denominator: what the
    sums hold of the near keys is taken off again. For features that are no logarithms.

    Shape: q (B, H, n, D), shift (B, H, n) or None for 0; n + 2 window tokens, the first of them ``window`` before the
        first query; sums of all keys.
    Cost: per query (block + 2 window) x (M + D + Dv) multiply-adds, and M x (Dv + 1).
    """
    length, heads, key_heads = q.shape[2], q.shape[1], tokens.k.shape[1]
    block = min(BLOCK, length)
    missing = -length % block
    span, groups = block + 2 * window, heads // key_heads
    q, near = F.pad(wide(q), (0, 0, 0, missing)), tokens.cut(0, length + missing + 2 * window)
    k, v = wide(near.k), wide(near.v)

    def rows(x: Tensor) -> Tensor:  # (B, H, n, R) -> (B, Hk, blocks, heads of a group x block, R)
        return x.unflatten(2, (-1, block)).unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(3, 4)

    def queries(x: Tensor) -> Tensor:  # the reverse
        return x.unflatten(3, (groups, block)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :length]

    def columns(x: Tensor) -> Tensor:  # (B, Hk, n + 2 window, R) -> (B, Hk, blocks, R, span)
        return x.unfold(2, span, block)

    apart = torch.arange(span, device=q.device)[None] - torch.arange(block, device=q.device)[:, None]
    allowed = near.mask.unfold(1, span, block)[:, None, :, None] & ((apart >= 0) & (apart <= 2 * window))
    allowed = allowed.repeat(1, 1, 1, groups, 1)
    phi_q, phi_k, values = features.query(q), features.key(k), columns(v).mT
    logits = (rows(exponent.query(q)) @ columns(exponent.key(k))).masked_fill(~allowed, -torch.inf)
    pairs = (rows(phi_q) @ columns(phi_k)).masked_fill(~allowed, 0.0)
    top = logits.detach().amax(-1)
    lift = torch.zeros_like(top) if shift is None else rows(F.pad(shift, (0, missing))[..., None])[..., 0]
    top = torch.maximum(top, lift.detach())
    exact, factor = (logits - top[..., None]).exp(), (lift - top).exp()
    pairs = pairs * factor[..., None]
    far = linear_reading(phi_q[:, :, :length], sums.kv, sums.z, _count(sums, q[:, :, :length]), features)
    of_rows = queries(factor[..., None])[..., 0]

    def total(weights: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        near = queries(weights @ values), queries(weights.sum(-1, keepdim=True))[..., 0]
        return near[0] + numerator * of_rows[..., None], near[1] + denominator * of_rows

    numerator, denominator = total(exact - pairs, far.numerator, far.denominator)
    magnitude = queries((exact + pairs.detach().abs()).sum(-1, keepdim=True))[..., 0] + far.magnitude * of_rows
    constant = None
    if far.constant is not None:
        of_constants = (rows(phi_q[..., -1:]) * columns(phi_k[..., -1:])).masked_fill(~allowed, 0.0)
        constant = total(exact - of_constants * factor[..., None], *far.constant)
    return Reading(numerator, denominator, magnitude.detach(), queries(top[..., None])[..., 0], constant)


def _count(sums: Sums, q: Tensor) -> Tensor:
    return sums.count[:, None, None].expand(q.shape[:-1])
