"""Exact attention within a local window: the baseline that many long-sequence results fail to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import whole_mask
from ..blocks import OutBlocks
from ..errors import InputError, OptionError
from ..fast.maps import Maps
from ..fast.spec import Side, Spec
from ..fused import fused_attention
from ..native.band import Problem
from ..native.band_op import band, takes_band
from ..sinks import Sinks, sinks_of, sinks_seen
from .base import Mechanism, State

_NO_FEATURES = Maps(Spec("product"), Spec("product"))


class Window(Mechanism):
    """softmax attention over the keys at most ``window`` positions away, and over the first ``sinks`` keys.

    Position i of N queries is key position i + S - N (the last query is aligned with the last key), so that
    with N > S the first queries may see nothing and give 0. Causal: the ``window`` keys before and the own one.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        window: keys on each side.
        sinks: how many of the first attended keys every query sees as well (causal: once they are there). Language
            models lay the weight that a head has no use for on the first tokens, and fail without them.

    Cost: N x (4 window + sinks) x (D + Dv) multiply-adds per head as computed, in blocks of queries. State: the last
        ``window`` keys, values and their mask, and the same of the sinks.
    Source: local attention as in Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1); deviations:
        no global tokens but sinks, no dilation. Sinks: Xiao et al. 2023, arXiv 2309.17453, section 3.2.
    """

    name = "window"
    causal = True
    aligned = True

    def __init__(
        self, head_dim: int, num_heads: int, num_kv_heads: int | None = None, *, window: int = 64, sinks: int = 0
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        if window < 1:
            raise OptionError(f"window: window is {window}; wanted at least 1 key on each side")
        if sinks < 0:
            raise OptionError(f"window: sinks is {sinks}; wanted 0 or more first keys")
        self.window = window
        self.sinks = sinks
        self.config = {"window": window, "sinks": sinks}

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        sinks = None
        if self.sinks:
            sinks, key_mask = sinks_of(k, v, whole_mask(k, key_mask), self.sinks)
        return self._banded(q, k, v, key_mask, scale, self.window, sinks, False)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        mask, sinks, lag = whole_mask(k, key_mask), None, 0
        past = None if state is None else self._known(state, k, v)
        if self.sinks:
            sinks, mask = sinks_of(k, v, mask, self.sinks, None if past is None else past[3:])
        if past is not None:
            lag = self.window
            k, v, mask = (
                torch.cat([old, new], dim=-1 if old.dim() == 2 else 2)
                for old, new in zip(past[:3], (k, v, mask), strict=True)
            )
        if sinks is not None:
            sinks = sinks._replace(position=torch.where(sinks.position < 0, sinks.position, sinks.position + lag))
        out = self._banded(q, k, v, mask, scale, 0, sinks, True)
        return out, (*self._tail(k, v, mask), *(() if sinks is None else sinks.state))

    def _known(self, state: State, k: Tensor, v: Tensor) -> State:
        """A state of these sizes."""
        wanted: list[tuple[int, ...]] = []
        for length in (self.window, *((self.sinks,) if self.sinks else ())):
            wanted += [(*x.shape[:2], length, x.shape[3]) for x in (k, v)]
            wanted.append((k.shape[0], length))
        if [tuple(x.shape) for x in state] != wanted:
            raise InputError(
                f"window: state has shapes {[tuple(x.shape) for x in state]}; wanted {wanted}: pass what this "
                "mechanism returned for this batch"
            )
        return state

    def _tail(self, k: Tensor, v: Tensor, mask: Tensor) -> State:
        """The last ``window`` keys, values and mask; shorter pasts are filled with masked zeros in front.

        Copies: a view would keep all the tokens of a call.
        """
        missing, first = max(self.window - k.shape[2], 0), max(k.shape[2] - self.window, 0)
        if not missing:
            return k[:, :, first:].clone(), v[:, :, first:].clone(), mask[:, first:].clone()
        pad = torch.nn.functional.pad
        return pad(k, (0, 0, missing, 0)), pad(v, (0, 0, missing, 0)), pad(mask, (missing, 0))

    def _banded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        scale: float,
        ahead: int,
        sinks: Sinks | None,
        is_causal: bool,
    ) -> Tensor:
        if takes_band(_NO_FEATURES, q, k, v, key_mask, apart=False):
            return self._by_kernels(q, k, v, key_mask, scale, sinks, is_causal)
        length, total = q.shape[2], k.shape[2]
        block = max(2 * self.window, 64)  # as many queries as they share keys beyond the band
        offset = total - length
        out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
        for start in range(0, length, block):
            stop = min(start + block, length)
            first = min(max(start + offset - self.window, 0), total)
            last = min(max(stop + offset + ahead, first), total)
            if last == first and sinks is None:
                out.add(v.new_zeros(*q.shape[:2], stop - start, v.shape[3]))
                continue
            rows = torch.arange(start + offset, stop + offset, device=q.device)[:, None]
            columns = torch.arange(first, last, device=q.device)[None, :]
            allowed = ((columns >= rows - self.window) & (columns <= rows + ahead))[None, None]
            if key_mask is not None:
                allowed = allowed & key_mask[:, None, None, first:last]
            keys, values = k[:, :, first:last], v[:, :, first:last]
            if sinks is not None:
                seen = sinks_seen(sinks, rows[:, 0] if is_causal else None)
                allowed = torch.cat([x.expand(len(k), 1, stop - start, x.shape[3]) for x in (seen, allowed)], dim=-1)
                keys, values = torch.cat([sinks.k, keys], dim=2), torch.cat([sinks.v, values], dim=2)
            part = fused_attention(q[:, :, start:stop], keys, values, allowed, scale=scale)
            out.add(part.masked_fill(~allowed.any(-1, keepdim=True), 0.0))
        return out.whole()

    def _by_kernels(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, sinks: Sinks | None, causal: bool
    ) -> Tensor:
        """As a hybrid without features."""
        offset = k.shape[2] - q.shape[2]
        if causal:  # the keys before the first query's own are window + 1 in number
            front = self.window + 1 - offset
            mask = torch.nn.functional.pad(whole_mask(k, key_mask), (front, 0))
            k, v, key_mask = *(torch.nn.functional.pad(x, (0, 0, front, 0)) for x in (k, v)), mask
        sink_k, sink_v, sink_mask, position = None, None, None, None
        if sinks is not None:
            sink_k, sink_v, sink_mask, position = sinks
            position = position - offset if causal else torch.full_like(position, -1)
        nothing = k.new_empty(*k.shape[:2], 0, v.shape[3], dtype=torch.float32)
        return band(
            Problem(
                q, k, v, key_mask, None, None, None, None, nothing, nothing[..., 0], None, None,
                sink_k, sink_v, sink_mask, position, Side(), Side(), Spec("product"), Spec("product"),
                scale, 0.0, self.window, causal,
            )
        )[0]  # fmt: skip

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """N x min(S, keys of a block and sinks) x (D + Dv)."""
        block = max(2 * self.window, 64)
        return num_queries * min(num_keys, block + 2 * self.window + self.sinks) * (self.head_dim + value_dim)
