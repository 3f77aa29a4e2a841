"""Exact attention within a local window: the baseline that many long-sequence results fail to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import OutBlocks
from ..errors import InputError, OptionError
from ..fused import fused_attention
from .base import Mechanism, State


class Window(Mechanism):
    """softmax attention over the keys at most ``window`` positions away; each query sees at most 2 window + 1.

    Position i of N queries is key position i + S - N (the last query is aligned with the last key), so that
    with N > S the first queries may see nothing and give 0. Causal: the ``window`` keys before and the own one.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        window: keys on each side.

    Cost: N x (4 window) x (D + Dv) multiply-adds per head as computed, in blocks of queries. State: the last
        ``window`` keys, values and their mask.
    Source: local attention as in Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1); deviations:
        no global tokens, no dilation.
    """

    name = "window"
    causal = True

    def __init__(self, head_dim: int, num_heads: int, num_kv_heads: int | None = None, *, window: int = 64) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        if window < 1:
            raise OptionError(f"window: window is {window}; wanted at least 1 key on each side")
        self.window = window
        self.config = {"window": window}

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return self._banded(q, k, v, key_mask, scale, self.window)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        if state is not None:
            wanted = [(*k.shape[:2], self.window, k.shape[3]), (*v.shape[:2], self.window, v.shape[3])]
            if [tuple(a.shape) for a in state[:2]] != wanted or len(state) != 3:
                raise InputError(
                    f"window: state has shapes {[tuple(a.shape) for a in state]}; wanted {wanted} and a mask: pass "
                    "what this mechanism returned for this batch"
                )
            k, v, mask = (
                torch.cat([old, new], dim=-1 if old.dim() == 2 else 2)
                for old, new in zip(state, (k, v, mask), strict=True)
            )
        return self._banded(q, k, v, mask, scale, 0), self._tail(k, v, mask)

    def _tail(self, k: Tensor, v: Tensor, mask: Tensor) -> State:
        """The last ``window`` keys, values and mask; shorter pasts are filled with masked zeros in front."""
        missing = max(self.window - k.shape[2], 0)
        pad = torch.nn.functional.pad
        return (
            pad(k[:, :, max(k.shape[2] - self.window, 0) :], (0, 0, missing, 0)),
            pad(v[:, :, max(v.shape[2] - self.window, 0) :], (0, 0, missing, 0)),
            pad(mask[:, max(mask.shape[1] - self.window, 0) :], (missing, 0)),
        )

    def _banded(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, ahead: int) -> Tensor:
        length, total = q.shape[2], k.shape[2]
        block = max(2 * self.window, 64)  # as many queries as they share keys beyond the band
        offset = total - length
        out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
        for start in range(0, length, block):
            stop = min(start + block, length)
            first = min(max(start + offset - self.window, 0), total)
            last = min(max(stop + offset + ahead, first), total)
            if last == first:
                out.add(v.new_zeros(*q.shape[:2], stop - start, v.shape[3]))
                continue
            rows = torch.arange(start + offset, stop + offset, device=q.device)[:, None]
            columns = torch.arange(first, last, device=q.device)[None, :]
            allowed = ((columns >= rows - self.window) & (columns <= rows + ahead))[None, None]
            if key_mask is not None:
                allowed = allowed & key_mask[:, None, None, first:last]
            part = fused_attention(
                q[:, :, start:stop],
                k[:, :, first:last],
                v[:, :, first:last],
                allowed,
                scale=scale,
            )
            out.add(part.masked_fill(~allowed.any(-1, keepdim=True), 0.0))
        return out.whole()

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """N x min(S, keys of a block) x (D + Dv)."""
        block = max(2 * self.window, 64)
        return num_queries * min(num_keys, block + 2 * self.window) * (self.head_dim + value_dim)
