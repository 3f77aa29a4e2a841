"""Exact softmax attention, fused: the baseline of everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import whole_mask
from ..blocks import OutBlocks
from ..errors import InputError, OptionError
from ..fused import fused_attention
from .base import Mechanism, State

_QUERY_BLOCK = 1024  # queries per call where a mask over queries and keys must be built


class Softmax(Mechanism):
    """softmax(scale Q K^T) V, by torch's fused scaled_dot_product_attention.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        dropout_p: probability that a weight is dropped in train mode.

    Cost: N x S x (D + Dv) multiply-adds per head. The state of a causal call is the past keys and values, so
        it grows with the length.
    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; deviations: none.
    """

    name = "softmax"
    causal = True

    def __init__(
        self, head_dim: int, num_heads: int, num_kv_heads: int | None = None, *, dropout_p: float = 0.0
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        if not 0 <= dropout_p < 1:
            raise OptionError(f"softmax: dropout_p is {dropout_p}; wanted a probability in [0, 1)")
        self.dropout_p = dropout_p
        self.config = {"dropout_p": dropout_p}

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        if k.shape[2] == 0:
            return v.new_zeros(*q.shape[:-1], v.shape[-1])
        return self._sdpa(q, k, v, None if key_mask is None else key_mask[:, None, None, :], False, scale)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        mask = whole_mask(k, key_mask)
        if state is not None:
            k, v, mask = _append(self.name, state, k, v, mask)
        new_state = (k, v, mask)
        length, total = q.shape[2], k.shape[2]
        if key_mask is None and state is None and length == total and length > 0:
            return self._sdpa(q, k, v, None, True, scale), new_state
        # SDPA aligns its causal mask top-left; ours is bottom-right, so the mask is built, a block of queries at a time
        positions = torch.arange(total, device=k.device)
        out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            seen = total - length + stop  # keys that some query of this block may see
            rows = positions[total - length + start : seen, None]
            allowed = (positions[None, :seen] <= rows) & mask[:, None, None, :seen]
            out.add(self._sdpa(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], allowed, False, scale))
        return out.whole(), new_state

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        out = fused_attention(q, k, v, allowed, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        # a row that may attend to nothing: 0, whichever fused kernel was chosen
        return out if allowed is None else out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """N x S x (D + Dv)."""
        return num_queries * num_keys * (self.head_dim + value_dim)


def _append(name: str, state: State, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if len(state) != 3 or state[0].shape[0] != k.shape[0] or state[0].shape[1] != k.shape[1]:
        raise InputError(
            f"{name}: state has shapes {[tuple(a.shape) for a in state]}; wanted past keys, values and mask of "
            f"this batch ({k.shape[0]}) and these key heads ({k.shape[1]})"
        )
    return torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2), torch.cat([state[2], mask], dim=1)
