"""Slow float64 oracles that define what is correct: every pair of query and key is made explicitly.

All take q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S) with True = attend, align the last
query with the last key when causal, give 0 to a query that may attend to nothing, and return (B, H, N, Dv) in
float64. Cost: N x S per head in time and memory. They share no code with what they judge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels import Kernel


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q k^T) v; with ``window`` only over keys at most that far away."""
    q, k, v = _expand(q, k, v)
    logits = (q @ k.mT) * _scale(q, scale)
    allowed = allowed_pairs(q, k, key_mask, is_causal, window)
    logits = logits.masked_fill(~allowed, -torch.inf)
    weights = torch.softmax(logits, dim=-1).masked_fill(~allowed, 0.0)  # a row without keys is NaN before the mask
    return weights @ v


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Weights proportional to f(scale q k^T), for any kernel: what random Maclaurin features estimate."""
    q, k, v = _expand(q, k, v)
    return weighted_values(kernel((q @ k.mT) * _scale(q, scale)), v, allowed_pairs(q, k, key_mask, is_causal))


def feature_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    floor: float = 0.0,
) -> Tensor:
    """Weights proportional to phi_q phi_k^T, for given features (B, H, N, M) and (B, Hk, S, M).

    With a floor the weights beyond those of the last feature are shrunk, row by row, until the sum of all weights is
    at least that share of the sum of those.
    """
    phi_q, phi_k, v = _expand(phi_q, phi_k, v)
    allowed = allowed_pairs(phi_q, phi_k, key_mask, is_causal)
    similarity = phi_q @ phi_k.mT
    if floor:
        constant = (phi_q[..., -1:] @ phi_k[..., -1:].mT).masked_fill(~allowed, 0.0)
        beyond = similarity.masked_fill(~allowed, 0.0) - constant
        sums = constant.sum(-1, keepdim=True), beyond.sum(-1, keepdim=True)
        share = torch.where(sums[0] + sums[1] < floor * sums[0], (floor - 1.0) * sums[0] / sums[1], 1.0)
        similarity = constant + share * beyond
    return weighted_values(similarity, v, allowed)


def efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalisation: str,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """rho_q(q) rho_k(k)^T v of Efficient Attention; rho_k over the keys that each query may see."""
    q, k, v = _expand(q, k, v)
    allowed = allowed_pairs(q, k, key_mask, is_causal)
    if normalisation == "scaling":
        count = allowed.sum(-1, keepdim=True).clamp_min(1)
        return ((q * scale) @ k.mT * allowed) @ v / count
    rho_q = torch.softmax(q * scale, dim=-1)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64, device=q.device)
    for i in range(q.shape[2]):
        seen = allowed[:, :, i].expand(k.shape[:3])[..., None]  # (B, H, S, 1)
        rho_k = torch.softmax(k.masked_fill(~seen, -torch.inf), dim=2).nan_to_num(0.0)
        out[:, :, i] = torch.einsum("bhd,bhsd,bhse->bhe", rho_q[:, :, i], rho_k, v)
    return out


def gated_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, gate: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The recurrence S_t = g_t S_{t-1} + (1 - g_t) phi_k v^T, z likewise, one position after the other.

    gate (B, Hk, S) in (0, 1); a masked key changes nothing. N = S.
    """
    heads = phi_q.shape[1]
    gate = gate.double().repeat_interleave(heads // gate.shape[1], dim=1)
    phi_q, phi_k, v = _expand(phi_q, phi_k, v)
    kv = torch.zeros(*phi_k.shape[:2], phi_k.shape[3], v.shape[3], dtype=torch.float64)
    z = torch.zeros(*phi_k.shape[:2], phi_k.shape[3], dtype=torch.float64)
    out = torch.zeros(*phi_q.shape[:3], v.shape[3], dtype=torch.float64)
    for t in range(phi_k.shape[2]):
        attend = torch.ones(phi_k.shape[0], dtype=torch.bool) if key_mask is None else key_mask[:, t]
        g = torch.where(attend[:, None], gate[:, :, t], torch.ones_like(gate[:, :, t]))
        kv = g[..., None, None] * kv + (1 - g)[..., None, None] * phi_k[:, :, t, :, None] * v[:, :, t, None, :]
        z = g[..., None] * z + (1 - g)[..., None] * phi_k[:, :, t]
        denominator = (phi_q[:, :, t] * z).sum(-1, keepdim=True)
        out[:, :, t] = torch.einsum("bhm,bhme->bhe", phi_q[:, :, t], kv) / torch.where(denominator == 0, 1, denominator)
    return out


def weighted_values(similarity: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """sum_j s_ij v_j / sum_j s_ij over allowed pairs; 0 where there are none."""
    similarity = similarity.masked_fill(~allowed, 0.0)  # a product would keep the NaN of a pair outside the domain
    total = similarity.sum(-1, keepdim=True)
    nothing = ~allowed.any(-1, keepdim=True)
    return (similarity @ v / torch.where(nothing, 1.0, total)).masked_fill(nothing, 0.0)


def allowed_pairs(q: Tensor, k: Tensor, key_mask: Tensor | None, is_causal: bool, window: int | None = None) -> Tensor:
    """(B or 1, 1, N, S) bool: which query may attend to which key."""
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    columns = torch.arange(k.shape[2], device=q.device)[None, :]
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if is_causal:
        allowed = allowed & (columns <= rows)
    if window is not None:
        allowed = allowed & ((columns - rows).abs() <= window)
    allowed = allowed[None, None]
    return allowed if key_mask is None else allowed & key_mask[:, None, None, :]


def _expand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return q.double(), k.double().repeat_interleave(groups, dim=1), v.double().repeat_interleave(groups, dim=1)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
