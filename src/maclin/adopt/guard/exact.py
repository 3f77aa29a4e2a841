"""Exact attention of a few query rows, all heads in one product, heads of a group without repetition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_NUMBERS = 2**23
"""Weights that exist at once: 32 MiB in float32."""
_CAUSAL_BLOCKS = 4
"""Blocks of rows of a causal call, so that early rows do not meet late keys: 5/8 of the products are left."""
_NOTHING = -1e30


class ExactRows(NamedTuple):
    """out (B, H, R, Dv) in at least float32; entropy_ratio (B, H, R): entropy over the log of the keys attended."""

    out: Tensor
    entropy_ratio: Tensor


def exact_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> ExactRows:
    """softmax(scale q kᵀ) v of the queries at ``positions`` (B, H, R); those that may attend to nothing give 0.

    Cost: B x H x R x S x (D + Dv) multiply-adds, and six passes over B x H x R x S numbers.
    """
    batch, heads, num_rows = positions.shape
    num_keys, width = k.shape[2], q.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.gather(2, positions[..., None].expand(-1, -1, -1, width)).to(dtype)
    rows = rows * (1.0 / math.sqrt(width) if scale is None else scale)
    k, v = k.to(dtype), v.to(dtype)
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)  # a weight of 0 does not undo NaN
    last = positions + (num_keys - q.shape[2])  # the key that stands where the query does
    attended = _attended(last, key_mask, is_causal, num_keys)
    at_once = max(1, _BLOCK_NUMBERS // max(1, batch * heads * num_keys))
    if is_causal:
        at_once = min(at_once, max(1, -(-num_rows // _CAUSAL_BLOCKS)))
    parts: list[ExactRows] = []
    for start in range(0, num_rows, at_once):
        block = slice(start, start + at_once)
        stop = num_keys
        if is_causal and positions.device.type == "cpu":  # elsewhere the host would have to wait for the device
            stop = int(last[..., block].max()) + 1
        mask = None if key_mask is None else key_mask[:, :stop]
        seen = last[:, :, block] if is_causal else None
        parts.append(_block(rows[:, :, block], k[:, :, :stop], v[:, :, :stop], seen, mask, attended[:, :, block]))
    return ExactRows(torch.cat([part.out for part in parts], 2), torch.cat([part.entropy_ratio for part in parts], 2))


def _attended(last: Tensor, key_mask: Tensor | None, is_causal: bool, num_keys: int) -> Tensor:
    """How many keys each row may attend to, (B, H, R)."""
    if key_mask is None:
        return last + 1 if is_causal else torch.full_like(last, num_keys)
    passed = key_mask.cumsum(-1)
    if is_causal:
        return passed.gather(1, last.flatten(1)).view(last.shape)
    return passed[:, -1, None, None].expand_as(last)


def _block(
    rows: Tensor,  # (B, H, R, D), scaled
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    last: Tensor | None,  # (B, H, R): the last key that each row may see
    key_mask: Tensor | None,  # (B, S)
    attended: Tensor,  # (B, H, R)
) -> ExactRows:
    grouped = (k.shape[0], k.shape[1], -1)
    logits = rows.reshape(*grouped, rows.shape[-1]) @ k.mT
    hidden = None if key_mask is None else ~key_mask[:, None, None]
    if last is not None:
        later = torch.arange(k.shape[2], device=k.device) > last.reshape(*grouped, 1)
        hidden = later if hidden is None else later | hidden
    if hidden is not None:
        logits.masked_fill_(hidden, _NOTHING)
    top = logits.amax(-1)
    weights = logits.softmax(-1)
    # log of the sum of exponentials, without exponentials anew: the largest weight is exp(top - log sum)
    log_sum = top - weights.amax(-1).log()
    many = attended.reshape(grouped)
    entropy = log_sum - torch.linalg.vecdot(weights, logits)
    ratio = torch.where(many > 1, entropy / many.clamp_min(2).log(), torch.ones_like(entropy))
    out = weights @ v
    if key_mask is not None:
        out = out * (many > 0)[..., None]
    return ExactRows(out.reshape(*attended.shape, v.shape[-1]), ratio.reshape(attended.shape))
