"""Linformer without a projection dimension: the keys themselves choose the projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..blocks import OutBlocks
from ..slots import blocks_of, mean_key, slot_centres, slot_shares, wide_block
from .base import Mechanism


class RevisitedLinformer(Mechanism):
    """softmax attention over content slots, as many as the head is wide; no k, no maximum length, nothing to tune.

    Slot c holds n_c alike keys, with mean key m_c, mean value u_c and mean squared distance s_c to m_c. G is the
    covariance of keys with values within slots, pooled over all slots and divided by the mean of s over the keys:

        z_c = scale |q| sqrt(s_c / D)        r_c = sqrt(1 + z_c² / log n_c)
        out = sum_c p_c (u_c + scale (s_c / r_c) G^T q)        p = softmax_c(scale q m_c + r_c log n_c)

    log n_c is the mass of the slot; r_c >= 1 is what the spread of its keys adds to their sum of exponentials; the
    last term is how far the mean value of the slot moves towards the keys that q prefers. With at most D different
    keys it is softmax attention, whatever their values and however often each occurs.

    The order of the keys changes nothing but rounding, nor do masked keys or the other samples of the batch. The
    gradient takes the assignment of keys to slots as constant.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).

    Cost: 2 S x (D² + D Dv) + N x (D² + 2 D Dv) + 33 D³ multiply-adds per head, and one sort of S numbers; memory
        beyond the tensors one block of tokens and a few numbers per key. The gradient recomputes the blocks.
    Source: the aim of Verma 2020, arXiv 2101.10277 (linear time and space, independent of the projection
        dimension), of which only the abstract was available; the formula is our own, so no deviation can be named.
        What q sees of a slot, scale q (k_j - m_c), is given the cumulant function of a normal inverse Gaussian
        variable, log n (sqrt(1 + z² / log n) - 1): that of a normal one while z is small, and at large z that of
        n keys of which the largest counts alone.
    """

    name = "revisited_linformer"

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return slot_attention(q, k, v, key_mask, scale)

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """2 S x (D² + D Dv) + N x (D² + 2 D Dv) + 33 D³."""
        d = self.head_dim
        return 2 * num_keys * d * (d + value_dim) + num_queries * d * (d + 2 * value_dim) + 33 * d**3


class Slots(NamedTuple):
    """What is kept of keys and values, for R = B Hk rows of C = D slots, with the scale of the logits in it.

    key (R, C, D): scale m; value (R, C, Dv): u; least (R, 1, C): l, log n but 1/2 for a single key, which has no
    spread; bias (R, 1, C): log n - l, minus infinity if empty; growth (R, 1, C): scale² l s / D; reach (R, C, 1):
    scale l s; drift (R, D, Dv): G.
    """

    key: Tensor
    value: Tensor
    least: Tensor
    bias: Tensor
    growth: Tensor
    reach: Tensor
    drift: Tensor


def slot_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """The formula of ``RevisitedLinformer`` on checked inputs.

    Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S); returns (B, H, N, Dv) in v's dtype.
    """
    shape = (*q.shape[:3], v.shape[3])
    if k.shape[2] == 0:
        return v.new_zeros(shape)
    slots = summarise(k, v, key_mask, scale)
    out = OutBlocks(v, shape)
    for tokens in blocks_of(q):
        arguments = (q[:, :, tokens], slots, v.dtype)
        if _recomputes(q, *slots):
            out.add(checkpoint(_read, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            out.add(_read(*arguments))
    return out.whole()


def summarise(k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Slots:
    """Assign the keys to slots and take the moments of each slot.

    Shape: k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S).
    Cost: 2 S x (D² + D Dv) multiply-adds per key head beside the centres of the slots.
    """
    width = k.shape[3]
    centre = mean_key(k, key_mask)
    centres = slot_centres(k, key_mask, centre)
    sums: _Sums | None = None
    for tokens in blocks_of(k, v.shape[3]):
        arguments = (k, v, key_mask, centre, centres, tokens)
        if _recomputes(k, v):
            block = checkpoint(_block_sums, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            block = _block_sums(*arguments)
        sums = block if sums is None else _Sums(*(a + b for a, b in zip(sums, block, strict=True)))
    assert sums is not None  # there is a key
    count = sums.mass.masked_fill(sums.mass == 0, 1.0)
    key, value = sums.key / count, sums.value / count
    within = (sums.square - sums.key.mul(key).sum(-1, keepdim=True)).clamp(min=0)
    # the floor is what rounding leaves of keys that coincide; a ratio of such numbers means nothing
    eps, tiny = torch.finfo(key.dtype).eps, torch.finfo(key.dtype).tiny
    total = within.sum(1, keepdim=True) + sums.square.detach().sum(1, keepdim=True) * eps + tiny
    spread = within / count
    log_mass = count.log()
    least = log_mass.clamp(min=0.5)
    empty = sums.mass == 0
    # a row that may attend to nothing reads slots of value 0
    bias = (log_mass - least).masked_fill(empty & ~empty.all(1, keepdim=True), -torch.inf)
    return Slots(
        key * scale,
        value,
        least.mT,
        bias.mT,
        (spread * least).mT * (scale**2 / width),
        spread * least * scale,
        (sums.cross - sums.key.mT @ value) / total,
    )


class _Sums(NamedTuple):
    """Per slot: how many keys (R, C, 1), their sums (R, C, D), squares (R, C, 1) and values (R, C, Dv); k v^T."""

    mass: Tensor
    key: Tensor
    square: Tensor
    value: Tensor
    cross: Tensor


def _block_sums(
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None,  # (B, S)
    centre: Tensor,  # (B, Hk, 1, D)
    centres: Tensor,  # (R, C, D)
    tokens: slice,
) -> _Sums:
    x, y = wide_block(k, tokens, key_mask, centre), wide_block(v, tokens, key_mask)
    dropped = None if key_mask is None else ~key_mask[:, tokens].repeat_interleave(k.shape[1], dim=0)
    shares = slot_shares(x.detach(), centres, dropped).mT
    return _Sums(
        shares.sum(-1, keepdim=True),
        shares @ x,
        shares @ torch.linalg.vector_norm(x, dim=-1, keepdim=True).square(),
        shares @ y,
        x.mT @ y,
    )


def _read(q: Tensor, slots: Slots, dtype: torch.dtype) -> Tensor:
    """What queries (B, H, n, D) read: (B, H, n, Dv)."""
    batch, heads, length, width = q.shape
    rows, _, value_width = slots.value.shape
    # the query heads of a group follow each other over the slots of their key head
    x = q.to(slots.key.dtype).reshape(rows, batch * heads // rows * length, width)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    root = torch.addcmul(slots.least.square(), square, slots.growth).sqrt()  # r l, so that 1 / r = l / root
    logits = torch.baddbmm(slots.bias, x, slots.key.mT).add_(root)
    # torch.softmax takes as long as three matrix products at this width; the sum divides out, which is narrower
    weights = logits.sub_(logits.detach().amax(-1, keepdim=True)).exp_()
    out = torch.addcmul(weights @ slots.value, x @ slots.drift, (weights / root) @ slots.reach)
    out = out / weights.sum(-1, keepdim=True)
    return out.view(batch, heads, length, value_width).to(dtype)


def _recomputes(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
