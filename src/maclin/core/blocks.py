"""out, assembled block by block."""

from __future__ import annotations

import torch
from torch import Tensor


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
