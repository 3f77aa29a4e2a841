"""Small algebra that the contraction and the feature maps share: dtypes of sums, grouped heads, log-scales."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of sums."""
    return x.to(accumulation_dtype(x.dtype))


def whole_mask(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """The mask (B, S) of keys (B, Hk, S, D); all of them where there is none."""
    if key_mask is not None:
        return key_mask
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)


def per_key_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, H, n, P) times weight (..., Hk, P, R): each query head uses the weight of its key head.

    Shape: weight is (Hk, P, R) or (B, Hk, P, R), Hk divides H; returns (B, H, n, R).
    """
    batch, heads, length, width = x.shape
    key_heads = weight.shape[-3]
    if heads == key_heads:
        return x @ weight
    product = x.reshape(batch, key_heads, heads // key_heads * length, width) @ weight
    return product.view(batch, heads, length, weight.shape[-1])


def grouped(x: Tensor, heads: int) -> Tensor:
    """(B, Hk, ...) -> (B, H, ...): each query head gets the numbers of its key head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, also where the squares would overflow."""
    top = x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.linalg.vector_norm(x / top, dim=-1) * top[..., 0]


def top_of(logs: Tensor, dim: int) -> Tensor:
    """The largest logarithm, as a scale: it cancels in out, so no gradient passes through it."""
    return finite(logs.detach().amax(dim))


def finite(log_scale: Tensor) -> Tensor:
    """A scale that can be subtracted: minus infinity, the scale of nothing, becomes 0."""
    return log_scale.masked_fill(log_scale == -torch.inf, 0.0)


def exp_difference(a: Tensor, top: Tensor) -> Tensor:
    """exp(a - top), 0 where a is minus infinity, whatever top is."""
    return (a - finite(top)).exp()
