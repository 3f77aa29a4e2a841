"""Content slots: which keys are alike, found from the keys alone, in linear time and in no order.

Every key head has as many slots as it is wide. Their centres are keys far apart from each other, moved to the
means of what they attract among a fixed number of keys; then each key belongs to the nearest centre.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .algebra import accumulation_dtype, wide
from .blocks import token_blocks

Array = np.ndarray[Any, np.dtype[Any]]

_LEAST_BYTES, _MOST_BYTES = 1 << 19, 1 << 20  # of a block of keys or queries
# The next three may be halved or doubled: the error on real keys moves by less than a fiftieth.
_ROUNDS = 1  # of Lloyd's algorithm
_SAMPLE = 4  # times D keys that it runs on
_EVEN = 4  # times D seed candidates spread evenly through all keys, beside the D farthest from the mean
_TABLE_BYTES = 1 << 26  # of distances between seed candidates: rows are taken a few at a time beyond it


def blocks_of(x: Tensor, width: int = 0) -> Iterator[slice]:
    """Blocks of the tokens of x (B, H, N, D), of which as many numbers are made as it is wide, or ``width``."""
    token_bytes = 4 * x.shape[0] * x.shape[1] * max(x.shape[3], width)
    return token_blocks(x.shape[2], token_bytes, _LEAST_BYTES, _MOST_BYTES)


def wide_block(
    x: Tensor,  # (B, Hk, S, W)
    tokens: slice,
    key_mask: Tensor | None,  # (B, S)
    centre: Tensor | None = None,  # (B, Hk, 1, W)
) -> Tensor:  # (B Hk, n, W)
    """One block of keys or values in the dtype of sums, relative to the centre, 0 where masked."""
    block = wide(x[:, :, tokens])
    if centre is not None:
        block = block - centre
    if key_mask is not None:
        block = block.masked_fill(~key_mask[:, None, tokens, None], 0.0)
    return block.flatten(0, 1)


@torch.no_grad()
def slot_shares(
    x: Tensor,  # (R, n, D)
    centres: Tensor,  # (R, C, D)
    dropped: Tensor | None,  # (R, n) bool
) -> Tensor:  # (R, n, C)
    """1 at the nearest centre of each token, 0 elsewhere; shared evenly between equally near ones; 0 where dropped.

    As a matrix, because sums over slots are then products with it: faster than scattering on every device, and the
    same on every run.
    """
    closeness = torch.bmm(x, centres.mT).sub_(0.5 * centres.square().sum(-1)[:, None])
    nearest = torch.eq(closeness, closeness.amax(-1, keepdim=True), out=torch.empty_like(closeness))
    shares = nearest.div_(nearest.sum(-1, keepdim=True))
    return shares if dropped is None else shares.masked_fill_(dropped[..., None], 0.0)


@torch.no_grad()
def mean_key(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean of the attended keys, (B, Hk, S, D) -> (B, Hk, 1, D); a reference point, so no gradient passes.

    Logits relative to it differ by a constant per query, which a softmax does not see; distances keep more digits.
    """
    batch, heads, length, width = k.shape
    total = k.new_zeros(batch * heads, width, dtype=accumulation_dtype(k.dtype))
    for tokens in blocks_of(k):
        total += wide_block(k, tokens, key_mask).sum(1)
    count = total.new_full((batch, 1, 1), length) if key_mask is None else key_mask.sum(-1)[:, None, None]
    return (total.view(batch, heads, width) / count.clamp(min=1))[:, :, None]


@torch.no_grad()
def slot_centres(k: Tensor, key_mask: Tensor | None, centre: Tensor) -> Tensor:
    """Centres of D slots, from the keys alone, relative to their mean.

    c <- D keys far apart; over 4 D keys: slot(j) = argmin_c |k_j - c|, c <- mean of the keys of the slot.

    At most D different keys have a centre each, however often each occurs; the order of the keys plays no part.

    Args:
        k: keys.
        key_mask: True = attend, or None.
        centre: ``mean_key(k, key_mask)``.

    Shape: k (B, Hk, S, D), key_mask (B, S), centre (B, Hk, 1, D); returns (B Hk, D, D).
    Cost: one sort of S numbers, S x 2 D and 33 D³ multiply-adds per key head.
    Source: farthest-first traversal (Gonzalez 1985) and Lloyd's algorithm (Lloyd 1982); deviations: the traversal
        sees 5 D candidates, the D keys farthest from the mean and 4 D spread evenly, and the algorithm a sample.
    """
    batch, heads, length, num_slots = k.shape
    rows = batch * heads
    masked = None if key_mask is None else ~key_mask.repeat_interleave(heads, dim=0)
    order, rank, far = _survey(k, key_mask, centre, masked)
    count = rank.new_full((rows, 1), length) if masked is None else (~masked).sum(-1, keepdim=True)

    samples, key_heads = (
        torch.arange(batch, device=k.device)[:, None, None],
        torch.arange(heads, device=k.device)[:, None],
    )

    def gather(index: Tensor) -> Tensor:  # (R, m) -> (R, m, D)
        return (k[samples, key_heads, index.view(batch, heads, -1)].to(centre.dtype) - centre).flatten(0, 1)

    steps = torch.arange(min(_EVEN * num_slots, length), device=k.device)
    # through the different keys, so that none is missed where they are few
    wanted = (steps * rank[:, -1:] // steps.numel() + 1).to(rank.dtype)
    even = order.gather(-1, torch.searchsorted(rank, wanted).clamp(max=length - 1))
    far = torch.where(torch.arange(far.shape[1], device=k.device) < count, far, even[:, :1])
    candidates = gather(torch.cat([even, far], dim=-1))
    table = candidates.shape[1] ** 2 * candidates.element_size()
    centres = torch.cat([_far_apart(part, num_slots) for part in candidates.split(max(_TABLE_BYTES // table, 1))])

    steps = torch.arange(min(_SAMPLE * num_slots, length), device=k.device)
    every = torch.where(count > steps.numel(), steps * count // steps.numel(), steps)
    sample = gather(order.gather(-1, every.clamp(max=length - 1)))
    dropped = steps >= count
    sample = sample.masked_fill(dropped[..., None], 0.0)
    for _ in range(_ROUNDS):
        shares = slot_shares(sample, centres, dropped).mT
        mass = shares.sum(-1, keepdim=True)
        centres = torch.where(mass > 0, shares @ sample / mass.masked_fill(mass == 0, 1.0), centres)
    return centres


def _survey(k: Tensor, key_mask: Tensor | None, centre: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of each row in an order of their own, masked ones last, and the D farthest from the centre.

    Returns order (R, S), rank (R, S): how many different keys there are up to each place of it, and far (R, D).
    """
    batch, heads, length, width = k.shape
    rows = batch * heads
    # no small integer combination of its entries is 0
    direction = torch.cos(torch.arange(width, device=k.device, dtype=centre.dtype) * 2.4 + 0.5)
    projection, norm = centre.new_empty(rows, length), centre.new_empty(rows, length)
    for tokens in blocks_of(k):
        x = wide_block(k, tokens, key_mask, centre)
        # not a matrix product, which may round equal keys differently
        projection[:, tokens] = (x * direction).sum(-1)
        norm[:, tokens] = torch.linalg.vector_norm(x, dim=-1)
    if masked is not None:
        projection.masked_fill_(masked, torch.inf)
        norm.masked_fill_(masked, -torch.inf)
    far = norm.topk(min(width, length), dim=-1).indices
    del norm
    ordered, order = projection.sort(-1)
    del projection
    new = ordered.isfinite()
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    del ordered
    return order, new.cumsum(-1, dtype=torch.int32), far


def _far_apart(candidates: Tensor, count: int) -> Tensor:
    """Farthest-first traversal, from the candidate nearest to the centre: (R, M, D) -> (R, count, D)."""
    rows, num, width = candidates.shape
    squares = candidates.square().sum(-1)
    # in place: the table is the largest thing here
    distance = (candidates @ candidates.mT).mul_(-2.0).add_(squares[:, None]).add_(squares[..., None])
    first = torch.arange(rows, device=candidates.device) * num
    start = squares.argmin(-1) + first
    if candidates.device.type == "cpu" and not torch.compiler.is_compiling():
        picks = torch.from_numpy(_traverse_numpy(distance.flatten(0, 1).numpy(), start.numpy(), first.numpy(), count))
    else:
        picks = _traverse(distance.flatten(0, 1), start, first, count)
    return candidates.flatten(0, 1).index_select(0, picks.flatten()).view(rows, count, width)


def _traverse(distance: Tensor, start: Tensor, first: Tensor, count: int) -> Tensor:
    """Picks (R, count), each the candidate farthest from those before; row r of ``first`` is where its table begins.

    Shape: distance (R M, M), start (R,), first (R,).
    """
    nearest, picks = distance.index_select(0, start), [start]
    for _ in range(count - 1):
        picks.append(nearest.argmax(-1) + first)
        nearest = torch.minimum(nearest, distance.index_select(0, picks[-1]))
    return torch.stack(picks, dim=1)


def _traverse_numpy(distance: Array, start: Array, first: Array, count: int) -> Array:
    """``_traverse`` on the CPU: a few numbers a step, where the calls cost, and numpy's cost a fifth of torch's."""
    picks = np.empty((len(start), count), dtype=np.int64)
    picks[:, 0] = start
    nearest = distance[start]
    for i in range(1, count):
        np.add(nearest.argmax(-1), first, out=picks[:, i])
        np.minimum(nearest, distance[picks[:, i]], out=nearest)
    return picks
