"""Attention by kernels, whatever the family of features: what a custom operator calls, forward and backward.

Everything is a function of tensors. Gradients are those of q, k and v; feature maps that learn take the torch path,
and a temperature is applied to q before.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from torch import Tensor

from . import causal as causal_contraction
from . import contraction, softmax
from .causal import Gradients
from .contraction import Reading, Sums
from .launch import Blocks, FeatureMap, is_channel


def attend(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,  # (B, H, N, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None = None,  # (B, S) bool
    floor: float = 0.0,
    blocks: Blocks | None = None,
) -> tuple[Reading, Sums]:
    """Every query reads every key: out with the denominators of its rows, and the sums; all that a backward needs.

    Raises:
        NoKernelError: no kernel for these sizes, this dtype or this device.
    """
    sums = contraction.accumulate(f_k, k, v, key_mask, blocks=blocks)
    if is_channel(f_k):
        return softmax.read(f_q, q, sums, v.dtype, blocks=blocks), sums
    return contraction.read(f_q, q, sums, v.dtype, floor, blocks=blocks), sums


def attend_backward(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    sums: Sums,
    grad: Tensor,  # (B, H, N, Dv), of out
    key_mask: Tensor | None = None,
    floor: float = 0.0,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``reading`` and ``sums`` are what ``attend`` returned."""
    if is_channel(f_k):
        dq, dkv, dz = softmax.read_backward(f_q, q, sums, reading, grad, blocks)
    else:
        dq, dkv, dz = contraction.read_backward(f_q, q, sums, reading, grad, floor, blocks)
    dk, dv = contraction.accumulate_backward(f_k, k, v, sums[2], dkv, dz, key_mask, blocks)
    return dq, dk, dv


def causal(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,
    k: Tensor,  # S >= N, the last query aligned with the last key
    v: Tensor,
    key_mask: Tensor | None = None,
    sums: Sums | None = None,
    floor: float = 0.0,
    blocks: Blocks | None = None,
) -> tuple[Reading, Sums]:
    """Every query reads the keys up to its own and those of ``sums``; also returns the sums of all keys."""
    if is_channel(f_k):
        return softmax.causal(f_q, f_k, q, k, v, key_mask, sums, blocks)
    return causal_contraction.causal(f_q, f_k, q, k, v, key_mask, sums, floor, blocks=blocks)


def causal_backward(
    f_q: FeatureMap,
    f_k: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reading: Reading,
    grad: Tensor,
    key_mask: Tensor | None = None,
    sums: Sums | None = None,  # what ``causal`` started from
    grad_sums: tuple[Tensor, Tensor] | None = None,  # of the kv and z that ``causal`` returned
    log_scale: Tensor | None = None,  # of the sums that ``causal`` returned; needed with ``grad_sums``
    floor: float = 0.0,
    blocks: Blocks | None = None,
) -> Gradients:
    """Gradients of q, k, v and, where ``causal`` started from sums, of their kv and z, else None."""
    given = (q, k, v, reading, grad, key_mask, sums, grad_sums, log_scale)
    if is_channel(f_k):
        return softmax.causal_backward(f_q, f_k, *given, blocks)
    return causal_contraction.causal_backward(f_q, f_k, *given, floor, blocks=blocks)
