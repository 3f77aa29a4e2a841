"""torch's fused attention with grouped key heads, on every device."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """scaled_dot_product_attention for Hk dividing H; ``allowed`` is bool, True = attend; torch's causal alignment.

    On the CPU torch has no fused kernel for grouped heads and would make all N x S weights, so there the key
    heads are repeated; elsewhere the kernels take them as they are.

    Shape: q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv); returns (B, H, N, Dv).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cpu":
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(
        q, k, v, allowed, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
