"""Blocks of tokens: how long they are, and how out is assembled from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MIN_BLOCK = 64  # tokens; below this, and in odd lengths, matrix products lose a third of their rate


def token_blocks(length: int, token_bytes: int, least_bytes: int, most_bytes: int) -> Iterator[slice]:
    """Slices that cover ``length`` tokens: quarters, within bounds on what is made of a block.

    Less than ``least_bytes``, and calls cost more than caches save. More than ``most_bytes``, and a block falls out of
    the caches; more than a quarter, and the allocator fetches memory from the system, and clears it, at every call.

    Args:
        length: tokens.
        token_bytes: of what is made of one token, all heads together.
        least_bytes: at which a block is long enough.
        most_bytes: at which it is too long.
    """
    token_bytes = max(token_bytes, 1)
    block = min(max(length // 4, least_bytes // token_bytes), most_bytes // token_bytes)
    block = max(block - block % _MIN_BLOCK, _MIN_BLOCK)
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


class OutBlocks:
    """A tensor (B, H, N, Dv) that is filled along N.

    Without gradients the blocks are written into place, so that nothing is held twice. With gradients they are
    concatenated: writing into slices would make each block's backward copy the whole gradient.

    Args:
        like: gives dtype and device.
        shape: of the whole.
    """

    def __init__(self, like: Tensor, shape: tuple[int, ...]) -> None:
        self._like = like
        self._shape = shape
        self._parts: list[Tensor] = []
        self._whole = None if torch.is_grad_enabled() else like.new_empty(shape)
        self._filled = 0

    def place(self, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """Where the next block of that many tokens can be written directly; None where ``add`` has to take it."""
        if self._whole is None or self._whole.dtype != dtype:
            return None
        start, self._filled = self._filled, self._filled + tokens
        return self._whole[..., start : self._filled, :]

    def add(self, block: Tensor) -> None:
        """Take the next block (B, H, n, Dv)."""
        if self._whole is None:
            self._parts.append(block.to(self._like.dtype))
            return
        start, self._filled = self._filled, self._filled + block.shape[-2]
        self._whole[..., start : self._filled, :] = block

    def whole(self) -> Tensor:
        """Everything that was taken."""
        if self._whole is not None:
            return self._whole
        return torch.cat(self._parts, dim=-2) if self._parts else self._like.new_zeros(self._shape)
