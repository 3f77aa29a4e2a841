"""Attention sinks: the first keys of a sequence, which every query may attend to exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sinks(NamedTuple):
    """The first attended keys of each sequence, as many as there are so far; the rest is masked.

    ``position`` is that among the keys of this call, -1 of those that came before.
    """

    k: Tensor  # (B, Hk, sinks, D)
    v: Tensor  # (B, Hk, sinks, Dv)
    mask: Tensor  # (B, sinks)
    position: Tensor  # (B, sinks)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept for the next call."""
        return self.k, self.v, self.mask


def sinks_of(
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    mask: Tensor,  # (B, S)
    number: int,
    past: tuple[Tensor, ...] | None = None,
) -> tuple[Sinks, Tensor]:
    """The sinks, those of earlier calls first, and the mask of all other keys.

    Padding is no sink: with padding on the left the sinks are the first real tokens.
    """
    if past is None:
        past = (
            k.new_zeros(*k.shape[:2], number, k.shape[3]),
            v.new_zeros(*v.shape[:2], number, v.shape[3]),
            mask.new_zeros(mask.shape[0], number),
        )
    known = past[2].sum(-1, keepdim=True)  # (B, 1)
    new = mask & (mask.cumsum(-1) + known <= number)
    slots = torch.arange(number, device=k.device)[None]
    if not k.shape[2]:
        return Sinks(past[0], past[1], past[2], torch.full_like(known, -1).expand(-1, number)), mask
    order = (~new).to(torch.uint8).argsort(dim=-1, stable=True)  # positions of the new ones, in their order, come first
    at = order.gather(1, (slots - known).clamp(0, k.shape[2] - 1))
    old = slots < known
    there = old | (slots < known + new.sum(-1, keepdim=True))

    def chosen(x: Tensor, before: Tensor) -> Tensor:
        found = x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        found = torch.where(old[:, None, :, None], before, found)
        return found.masked_fill(~there[:, None, :, None], 0.0)

    position = torch.where(old, torch.full_like(at, -1), at)
    return Sinks(chosen(k, past[0]), chosen(v, past[1]), there, position), mask & ~new


def sinks_seen(sinks: Sinks, rows: Tensor | None) -> Tensor:
    """Which sinks queries at these positions (n,) among the keys may attend to, (B, 1, n or 1, sinks); None for all."""
    seen = sinks.mask[:, None, None]
    return seen if rows is None else seen & (sinks.position[:, None, None] <= rows[:, None])
