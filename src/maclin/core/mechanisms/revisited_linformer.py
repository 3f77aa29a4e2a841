"""Linformer without a projection dimension: the keys themselves choose the projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..contract import accumulation_dtype
from ..slots import assign_slots, centre_of, of_slots, slot_sums, token_blocks, wide_block
from .base import Mechanism


class RevisitedLinformer(Mechanism):
    """softmax attention over content slots, as many as the head is wide; no k, no maximum length, nothing to tune.

    Slot c holds n_c alike keys, with mean key m_c, mean value u_c and mean squared distance s_c to m_c. With P and
    G the covariance of keys, and of keys with values, within slots, pooled over all slots and divided by tr P:

        z_c² = scale² s_c q^T P q        r_c = sqrt(1 + z_c² / log n_c)
        out = sum_c p_c (u_c + scale (s_c / r_c) G^T q),    p = softmax_c(scale q m_c + r_c log n_c)

    where log n_c is the mass of the slot, r_c >= 1 what the spread of its keys adds to their sum of exponentials,
    and the last term how far the mean value of the slot moves towards the keys that q prefers. Exact when the keys
    of each slot coincide, whatever their values: with at most D different keys it is softmax attention, gradient
    to q and v included. Assignment to slots is constant for the gradient.

    The order of the keys changes nothing but rounding, nor do masked keys or the other samples of the batch.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).

    Cost: S x (4 D² + D Dv) + N x (2 D² + 2 D Dv) multiply-adds per head, 16 D³ for the seeds; memory beyond the
        tensors one block of tokens and one integer per key, also for the gradient, which recomputes the blocks.
    Source: the aim of Verma 2020, arXiv 2101.10277 (linear in time and space, independent of the projection
        dimension), of which only the abstract was available: the formula is our own. Deviation: unknown for that
        reason. The keys of a slot as one query sees them are modelled as log n_c times a normal inverse Gaussian
        variable whose logarithmic moments agree at z = 0 (a normal distribution) and at infinity (the largest of
        n_c keys, counted once).
    """

    name = "revisited_linformer"

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return slot_attention(q, k, v, key_mask, scale)

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """S x (4 D² + D Dv) + N x (2 D² + 2 D Dv) + 16 D³."""
        d = self.head_dim
        return num_keys * d * (4 * d + value_dim) + num_queries * d * 2 * (d + value_dim) + 16 * d**3


class Slots(NamedTuple):
    """What is kept of the keys and values: R = B Hk rows, C = D slots each.

    key (R, C, D) and value (R, C, Dv): means; log_mass (R, 1, C), 0 if empty; bias (R, 1, C): minus infinity if
    empty; spread (R, C, 1): s_c; within (R, D, D + Dv): P beside G.
    """

    key: Tensor
    value: Tensor
    log_mass: Tensor
    bias: Tensor
    spread: Tensor
    within: Tensor


def slot_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """The formula of ``RevisitedLinformer`` on checked inputs.

    Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S); returns (B, H, N, Dv).
    """
    batch, heads, length, _ = q.shape
    if k.shape[2] == 0:
        return v.new_zeros(batch, heads, length, v.shape[3])
    slots = summarise(k, v, key_mask)
    recompute = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    parts = (
        checkpoint(_read, q[:, :, tokens], slots, scale, v.dtype, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _read(q[:, :, tokens], slots, scale, v.dtype)
        for tokens in token_blocks(length, batch * heads, q.shape[3])
    )
    if recompute:
        return torch.cat(list(parts), dim=2)
    out = v.new_empty(batch, heads, length, v.shape[3])
    for tokens, part in zip(token_blocks(length, batch * heads, q.shape[3]), parts, strict=True):
        out[:, :, tokens] = part
    return out


def summarise(k: Tensor, v: Tensor, key_mask: Tensor | None) -> Slots:
    """Assign the keys to slots, and take the moments of each.

    Shape: k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S).
    Cost: S x (4 D² + D Dv) multiply-adds per key head.
    """
    batch, heads, length, width = k.shape
    value_width = v.shape[3]
    rows = batch * heads
    centre = centre_of(k.detach(), key_mask)
    ids = assign_slots(k, key_mask, centre)
    recompute = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)

    like = {"dtype": accumulation_dtype(k.dtype), "device": k.device}
    mass = torch.zeros(rows, width, 1, **like)
    key_sums, value_sums = torch.zeros(rows, width, width, **like), torch.zeros(rows, width, value_width, **like)
    norm = torch.zeros(rows, 1, 1, **like)
    blocks = list(token_blocks(length, rows, max(width, value_width)))
    for tokens in blocks:
        x, y = wide_block(k, tokens, key_mask, centre), wide_block(v, tokens, key_mask)
        mass = mass + slot_sums(ids[:, tokens], x.new_ones(*x.shape[:-1], 1), width)
        key_sums, value_sums = key_sums + slot_sums(ids[:, tokens], x, width), value_sums + slot_sums(ids[:, tokens], y, width)
        norm = norm + x.detach().square().sum((1, 2))[:, None, None]
    count = mass.clamp(min=1)
    key, value = key_sums / count, value_sums / count

    spread = torch.zeros(rows, width, 1, **like)
    within = torch.zeros(rows, width, width + value_width, **like)
    for tokens in blocks:
        arguments = (k, v, key_mask, centre, key, value, ids, tokens)
        if recompute:
            parts = checkpoint(_within, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            parts = _within(*arguments)
        spread, within = spread + parts[0], within + parts[1]
    # the floor is what rounding leaves of the spread of keys that coincide: their ratio means nothing
    total = spread.sum(1, keepdim=True) + norm * torch.finfo(norm.dtype).eps + torch.finfo(norm.dtype).tiny
    empty = (mass == 0).mT
    return Slots(
        key,
        value,
        count.log().mT,
        # a row without any key attends evenly to slots of value 0
        torch.zeros_like(mass.mT).masked_fill(empty & ~empty.all(-1, keepdim=True), -torch.inf),
        spread / count,
        within / total,
    )


def _within(
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None,  # (B, S)
    centre: Tensor,  # (B, Hk, 1, D)
    key: Tensor,  # (R, C, D)
    value: Tensor,  # (R, C, Dv)
    ids: Tensor,  # (R, S)
    tokens: slice,
) -> tuple[Tensor, Tensor]:  # (R, C, 1), (R, D, D + Dv)
    """Sums over one block: squared distances to the slot's mean key, and its products with those of values."""
    ids = ids[:, tokens]
    x = wide_block(k, tokens, key_mask, centre) - of_slots(ids, key)
    y = wide_block(v, tokens, key_mask) - of_slots(ids, value)
    squares = x.square().sum(-1, keepdim=True)
    return slot_sums(ids, squares, key.shape[1]), torch.cat([x.mT @ x, x.mT @ y], dim=-1)


def _read(q: Tensor, slots: Slots, scale: float, dtype: torch.dtype) -> Tensor:
    """What queries (B, H, n, D) read: (B, H, n, Dv)."""
    batch, heads, length, width = q.shape
    rows, _, value_width = slots.value.shape
    # the query heads of a group stand one after the other over the slots of their key head
    x = (q.to(slots.key.dtype) * scale).reshape(rows, batch * heads // rows * length, width)
    along = x @ slots.within
    spread_along = (along[..., :width] * x).sum(-1, keepdim=True)  # scale² q^T P q
    least = slots.log_mass.clamp(min=0.5)  # of two keys or more it is log 2 at least; one key has no spread
    stretch = (1.0 + spread_along * (slots.spread.mT / least)).sqrt()
    weights = torch.softmax(torch.baddbmm(slots.bias, x, slots.key.mT).addcmul(slots.log_mass, stretch), dim=-1)
    shift = (weights / stretch) @ slots.spread
    out = torch.baddbmm(along[..., width:] * shift, weights, slots.value)
    return out.view(batch, heads, length, value_width).to(dtype)
