"""How many tokens a block has, and how out lies in memory."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_DEFAULT_CACHE = 1 << 20
_SHARE = 3.0  # of the second-level caches that a block may take: less, and calls cost more than caches save
_DEVICE_BYTES = 1 << 26  # of a block where calls are dear and memory is not
_STEP = 64  # tokens; in odd lengths matrix products lose a third of their rate


def block_tokens(length: int, token_bytes: int, device: torch.device) -> int:
    """Tokens of a block: as many as the second-level caches of all threads hold, in blocks of equal length.

    Args:
        length: of the whole.
        token_bytes: of what is made and read of one token, all heads together.
        device: where.
    """
    room = int(_SHARE * cache_bytes() * torch.get_num_threads()) if device.type == "cpu" else _DEVICE_BYTES
    most = max(room // max(token_bytes, 1) // _STEP * _STEP, _STEP)
    if length <= most:
        return max(length, 1)
    number = -(-length // most)
    return -(-length // number // _STEP) * _STEP


def like_queries(q: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """New (B, H, N, width), heads next to each other in memory where those of q are: projections then need no copy."""
    batch, heads, length, _ = q.shape
    if heads > 1 and q.stride(1) < q.stride(2):
        return q.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    return q.new_empty(batch, heads, length, width, dtype=dtype)


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """Size of the second-level cache of one core; 1 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or _DEFAULT_CACHE
    except (OSError, ValueError, AttributeError):
        return _DEFAULT_CACHE
