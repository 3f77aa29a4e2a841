"""Linformer: keys and values projected to k positions before an exact softmax."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..algebra import accumulation_dtype
from ..errors import InputError, OptionError
from ..fused import fused_attention
from .base import Mechanism, check_choice

SHARINGS = ("none", "headwise", "key-value", "layerwise")
PROJECTIONS = ("learned", "mean-pool", "max-pool", "conv")


class Linformer(Mechanism):
    """softmax(scale Q (E K)^T) (F V): S keys become k = proj_len slots.

    ``projection="learned"``: E, F (k, seq_len) are parameters; the columns of a shorter input are its first S.
    ``"mean-pool"``, ``"max-pool"``, ``"conv"``: no parameters; the attended keys of each sample, in order, are
    cut into k segments of equal length, and each is averaged, maximised per channel, or averaged with a Hann
    window. They depend on nothing but the attended keys, so padding of any kind equals cropping.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        seq_len: longest S; needed for "learned", otherwise None sets no limit.
        proj_len: k; default min(128, seq_len // 4), or 128 without seq_len.
        projection: as above.
        sharing: of learned projections: "none" (E and F per head), "headwise" (one E, one F), "key-value"
            (one E = F for all heads), "layerwise" (the same E for all layers: pass the first layer's ``E`` as
            ``shared``).
        shared: the E of another layer, for "layerwise".
        generator: of the initial E and F, normal with variance 1 / k; None is torch's own.

    Raises:
        OptionError: unknown names, no seq_len where it is needed, proj_len that does not fit, a shared E of
            another shape.
        InputError: (in a call) more keys than seq_len.
        CapabilityError: (in a call) is_causal; E mixes positions, so a causal Linformer would see the future.

    Cost: (S x k + N x k) x (D + Dv) multiply-adds per head learned, S + N x k x (D + Dv) pooled.
    Source: Wang et al. 2020, arXiv 2006.04768, equation 7 and section 4; deviations: pooling by segments of the
        attended keys; the convolution's kernel is fixed (Hann), not learned.
    """

    name = "linformer"

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        seq_len: int | None = None,
        proj_len: int | None = None,
        projection: Literal["learned", "mean-pool", "max-pool", "conv"] = "learned",
        sharing: Literal["none", "headwise", "key-value", "layerwise"] = "headwise",
        shared: nn.Parameter | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        check_choice(self.name, "projection", projection, PROJECTIONS)
        check_choice(self.name, "sharing", sharing, SHARINGS)
        if seq_len is None and projection == "learned":
            raise OptionError(
                "linformer: projection='learned' needs seq_len, the longest input; pass it, or projection='mean-pool'"
            )
        if proj_len is None:
            proj_len = 128 if seq_len is None else max(min(128, seq_len // 4), 1)
        if proj_len < 1 or (seq_len is not None and not 1 <= proj_len <= seq_len):
            raise OptionError(f"linformer: proj_len is {proj_len}; wanted from 1 to seq_len ({seq_len})")
        if shared is not None and (sharing != "layerwise" or projection != "learned"):
            raise OptionError("linformer: shared is for sharing='layerwise' with projection='learned'")
        self.seq_len = seq_len
        self.proj_len = proj_len
        self.projection = projection
        self.sharing = sharing
        self.config = {"seq_len": seq_len, "proj_len": proj_len, "projection": projection, "sharing": sharing}
        e = f = None
        if projection == "learned" and seq_len is not None:
            heads = self.num_kv_heads if sharing == "none" else 1
            shape = (heads, proj_len, seq_len)
            if shared is not None and shared.shape != shape:
                raise OptionError(f"linformer: shared has shape {tuple(shared.shape)}; wanted {shape}")
            e = _initial(shape, generator) if shared is None else shared
            # E = F in the two modes that share between keys and values
            f = _initial(shape, generator) if sharing in ("none", "headwise") else None
        self.E: nn.Parameter | None = e
        self.F: nn.Parameter | None = f

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        if self.seq_len is not None and k.shape[2] > self.seq_len:
            raise InputError(
                f"linformer: {k.shape[2]} keys, but it was built for seq_len={self.seq_len}; build it longer, or use "
                "a mechanism without a maximum, revisited_linformer for one"
            )
        dtype = accumulation_dtype(q.dtype)
        k, v_wide = k.to(dtype), v.to(dtype)
        if self.E is not None:
            slots_k, slots_v, used = self._learned(k, v_wide, key_mask)
        else:
            slots_k, slots_v, used = self._pooled(k, v_wide, key_mask)
        return _slot_attention(q, slots_k, slots_v, used, scale).to(v.dtype)

    def _learned(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        length = k.shape[2]
        if self.E is None:
            raise OptionError("linformer: this mechanism was built without learned projections")
        if key_mask is not None:
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (k, v))
        project_k = self.E[..., :length].to(k.dtype)
        project_v = project_k if self.F is None else self.F[..., :length].to(k.dtype)
        attended = k.shape[2] > 0 if key_mask is None else key_mask.any(-1)[:, None]
        used = torch.ones(k.shape[0], self.proj_len, dtype=torch.bool, device=k.device) & attended
        return project_k @ k, project_v @ v, used

    def _pooled(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, length, _ = k.shape
        mask = torch.ones(batch, length, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        count = mask.sum(-1, keepdim=True)
        rank = (mask.cumsum(-1) - 1).clamp_min(0)  # position among the attended keys
        segment = (rank * self.proj_len).div(count.clamp_min(1), rounding_mode="floor")
        segment = segment.masked_fill(~mask, self.proj_len)  # masked keys go to a slot that is dropped
        weight = mask.to(k.dtype)
        if self.projection == "conv":
            # in integers: in float32 a rank above 2^24 is not exact
            width = (count + self.proj_len - 1).div(self.proj_len, rounding_mode="floor").clamp_min(1)
            start = (segment * count + self.proj_len - 1).div(self.proj_len, rounding_mode="floor")  # its first rank
            phase = (rank - start + 0.5).to(k.dtype) / width
            weight = weight * torch.sin(math.pi * phase.clamp(0.0, 1.0)).square().clamp_min(1e-3)
        mass = k.new_zeros(batch, self.proj_len + 1).scatter_add_(1, segment, weight)[:, :-1]
        if self.projection == "max-pool":
            return _segment_max(k, segment, self.proj_len), _segment_max(v, segment, self.proj_len), mass > 0
        scale = 1.0 / mass.masked_fill(mass == 0, 1.0)
        slots = (_segment_sum(x * weight[:, None, :, None], segment, self.proj_len) for x in (k, v))
        slots_k, slots_v = (x * scale[:, None, :, None] for x in slots)
        return slots_k, slots_v, mass > 0

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """(S x k + N x k) x (D + Dv) learned, S + N x k x (D + Dv) pooled."""
        widths = self.head_dim + value_dim
        projecting = num_keys * widths * (self.proj_len if self.E is not None else 1)
        return projecting + num_queries * self.proj_len * widths


def _initial(shape: tuple[int, ...], generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[1]))


def _segment_sum(x: Tensor, segment: Tensor, slots: int) -> Tensor:
    """(B, Hk, S, P) summed by segment (B, S) -> (B, Hk, slots, P); segment ``slots`` is dropped."""
    index = segment[:, None, :, None].expand_as(x)
    return x.new_zeros(*x.shape[:2], slots + 1, x.shape[3]).scatter_add(2, index, x)[:, :, :-1]


def _segment_max(x: Tensor, segment: Tensor, slots: int) -> Tensor:
    index = segment[:, None, :, None].expand_as(x)
    start = x.new_zeros(*x.shape[:2], slots + 1, x.shape[3])
    return start.scatter_reduce(2, index, x, reduce="amax", include_self=False)[:, :, :-1]


def _slot_attention(q: Tensor, slots_k: Tensor, slots_v: Tensor, used: Tensor, scale: float) -> Tensor:
    """Exact softmax over the slots in use (B, k); samples without any give 0."""
    # where no slot is in use all values are 0, and so is whatever is read of them
    allowed = (used | ~used.any(-1, keepdim=True))[:, None, None, :]
    return fused_attention(q.to(slots_k.dtype), slots_k, slots_v, allowed, scale=scale)
