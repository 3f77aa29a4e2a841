"""Content slots: which keys are alike, found from the keys alone, in linear time and in no order.

Every key head has as many slots as it is wide. Seeds are keys far apart from each other; two rounds of Lloyd's
algorithm move them to the means of what they attract. Tokens are taken block by block, so nothing larger than
one number per key is held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import accumulation_dtype

_BLOCK_BYTES = 1 << 21  # one block of keys or queries: it stays in the caches of a CPU
_MIN_BLOCK = 64  # tokens; below this the matrix products are too thin
_ROUNDS = 2  # of Lloyd's algorithm; the seeds do the work, and 1 or 8 rounds change the error by a hundredth


def token_blocks(length: int, rows: int, width: int) -> Iterator[slice]:
    """Slices that cover ``length`` tokens of ``rows`` heads, each of at most ``width`` numbers a token.

    Cost: none; a block holds about 2 MiB in float32, whatever the length.
    """
    block = max(_BLOCK_BYTES // (4 * max(rows * width, 1)), _MIN_BLOCK)
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def wide_block(
    x: Tensor,  # (B, Hk, S, W)
    tokens: slice,
    key_mask: Tensor | None,  # (B, S)
    centre: Tensor | None = None,  # (B, Hk, 1, W)
) -> Tensor:  # (B Hk, n, W)
    """One block of keys or values in the dtype of sums, moved by ``-centre``, 0 where masked."""
    block = x[:, :, tokens].to(accumulation_dtype(x.dtype))
    if centre is not None:
        block = block - centre
    if key_mask is not None:
        block = block.masked_fill(~key_mask[:, None, tokens, None], 0.0)
    return block.flatten(0, 1)


def slot_sums(ids: Tensor, x: Tensor, num_slots: int) -> Tensor:
    """Sums of x over the tokens of each slot, the same on every run.

    Shape: ids (R, n) integers up to num_slots (which drops the token), x (R, n, W); returns (R, num_slots, W).
    Cost: R x n x W additions, on CUDA as a product with the one-hot matrix of the block.
    """
    rows, _, width = x.shape
    if x.is_cuda:
        # a scattered addition has no fixed order there
        slots = torch.arange(num_slots, device=x.device)[:, None]
        return (ids[:, None] == slots).to(x.dtype) @ x
    first = torch.arange(rows, device=x.device)[:, None] * (num_slots + 1)
    sums = x.new_zeros(rows * (num_slots + 1), width).index_add(0, (ids + first).flatten(), x.flatten(0, 1))
    return sums.view(rows, num_slots + 1, width)[:, :num_slots]


def of_slots(ids: Tensor, table: Tensor) -> Tensor:
    """What each token's slot holds: table (R, C, W) -> (R, n, W), 0 for the id C."""
    rows, num_slots, width = table.shape
    table = torch.cat([table, table.new_zeros(rows, 1, width)], dim=1)
    first = torch.arange(rows, device=ids.device)[:, None] * (num_slots + 1)
    return table.flatten(0, 1).index_select(0, (ids + first).flatten()).view(*ids.shape, width)


def centre_of(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean of the attended keys, (B, Hk, S, D) -> (B, Hk, 1, D).

    Logits relative to it differ by a constant per query, which a softmax does not see; distances keep more digits.
    """
    batch, heads, length, width = k.shape
    total = k.new_zeros(batch * heads, width, dtype=accumulation_dtype(k.dtype))
    for tokens in token_blocks(length, batch * heads, width):
        total = total + wide_block(k, tokens, key_mask).sum(1)
    count = total.new_full((batch, 1, 1), length) if key_mask is None else key_mask.sum(-1)[:, None, None]
    return (total.view(batch, heads, width) / count.clamp(min=1))[:, :, None]


@torch.no_grad()
def assign_slots(k: Tensor, key_mask: Tensor | None, centre: Tensor) -> Tensor:
    """The slot of each key, from the keys alone: as many slots as a head is wide.

    c <- far-apart keys; twice: slot(j) = argmin_c |k_j - c|, c <- mean of the keys of the slot; then slot(j) again.

    At most D different keys have a slot each, however often each occurs; the order of the keys plays no part.

    Args:
        k: keys.
        key_mask: True = attend, or None.
        centre: ``centre_of(k, key_mask)``.

    Shape: k (B, Hk, S, D), key_mask (B, S), centre (B, Hk, 1, D); returns (B Hk, S) integers, D where masked.
    Cost: 3 x S x D² multiply-adds and one sort of S numbers per key head, and 16 D³ for the seeds.
    Source: farthest-first traversal (Gonzalez 1985), Lloyd 1982. Deviation: the traversal sees 4 D candidates.
    """
    batch, heads, length, num_slots = k.shape
    centres = _far_apart(_candidates(k, key_mask, centre), num_slots)
    ids = torch.empty(batch * heads, length, dtype=torch.long, device=k.device)
    masked = None if key_mask is None else ~key_mask.repeat_interleave(heads, dim=0)
    for round_ in range(_ROUNDS + 1):
        sums, mass = torch.zeros_like(centres), torch.zeros_like(centres[..., :1])
        bias = -0.5 * centres.square().sum(-1)[:, None]
        for tokens in token_blocks(length, batch * heads, num_slots):
            x = wide_block(k, tokens, key_mask, centre)
            block_ids = torch.baddbmm(bias, x, centres.mT).max(-1).indices
            if masked is not None:
                block_ids = block_ids.masked_fill(masked[:, tokens], num_slots)
            if round_ == _ROUNDS:
                ids[:, tokens] = block_ids
            else:
                sums += slot_sums(block_ids, x, num_slots)
                mass += slot_sums(block_ids, x.new_ones(*x.shape[:-1], 1), num_slots)
        centres = torch.where(mass > 0, sums / mass.clamp(min=1), centres)
    return ids


def _candidates(k: Tensor, key_mask: Tensor | None, centre: Tensor) -> Tensor:
    """4 D keys among which seeds are sought, relative to the centre: (B Hk, 4 D, D).

    Both extremes of each coordinate, where the keys that draw attention lie, and 2 D more at even steps through
    the different keys in the order of their projections on one direction.
    """
    batch, heads, length, width = k.shape
    rows = batch * heads
    # no two coordinates, nor small integer combinations of them, are alike
    direction = torch.cos(torch.arange(width, device=k.device, dtype=centre.dtype) * 2.4 + 0.5)
    projection = centre.new_empty(rows, length)
    top = centre.new_full((2, rows, width), -torch.inf)
    where_top = torch.zeros(2, rows, width, dtype=torch.long, device=k.device)
    for tokens in token_blocks(length, rows, width):
        x = wide_block(k, tokens, key_mask, centre)
        # not a matrix product: that may round equal rows differently
        projected = (x * direction).sum(-1)
        # tilted, or keys that tie in one coordinate would be told apart by their order
        tilted = x + projected[..., None] * 2**-10
        for side, signed in enumerate((tilted, -tilted)):
            if key_mask is not None:
                signed = signed.masked_fill(~_per_row(key_mask[:, tokens], heads)[..., None], -torch.inf)
            value, index = signed.max(1)
            better = value > top[side]
            top[side] = torch.where(better, value, top[side])
            where_top[side] = torch.where(better, index + tokens.start, where_top[side])
        projection[:, tokens] = projected
    if key_mask is not None:
        projection = projection.masked_fill(~_per_row(key_mask, heads), torch.inf)
    ordered, order = projection.sort(-1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = (new & ordered.isfinite()).cumsum(-1)  # 1 for the first of the different keys
    steps = torch.arange(2 * width, device=k.device)
    wanted = steps * rank[:, -1:] // (2 * width) + 1
    spread = order.gather(-1, torch.searchsorted(rank, wanted).clamp(max=length - 1))
    chosen = torch.cat([where_top[0], where_top[1], spread], dim=-1).view(batch, heads, 4 * width, 1)
    return (k.gather(2, chosen.expand(-1, -1, -1, width)).to(centre.dtype) - centre).flatten(0, 1)


def _far_apart(candidates: Tensor, count: int) -> Tensor:
    """Farthest-first traversal, from the candidate nearest to the centre: (R, M, D) -> (R, count, D)."""
    rows, num, width = candidates.shape
    squares = candidates.square().sum(-1)
    distance = torch.baddbmm(squares[:, None] + squares[..., None], candidates, candidates.mT, alpha=-2.0)
    distance = distance.flatten(0, 1)
    first = torch.arange(rows, device=candidates.device) * num
    picked = squares.argmin(-1) + first
    nearest = candidates.new_full((rows, num), torch.inf)
    picks = [picked]
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distance.index_select(0, picked))
        picked = nearest.argmax(-1) + first
        picks.append(picked)
    return candidates.flatten(0, 1).index_select(0, torch.stack(picks, dim=1).flatten()).view(rows, count, width)


def _per_row(key_mask: Tensor, heads: int) -> Tensor:
    return key_mask.repeat_interleave(heads, dim=0)
