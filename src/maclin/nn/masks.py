"""torch's masks at the border: there True means ignore, inside of maclin True means attend. Flipped here, once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import CapabilityError, InputError


def key_mask_of(key_padding_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """torch's mask over keys -> (B, S) bool, True = attend.

    Args:
        key_padding_mask: (B, S), or (S,) for a batch of one; bool with True = ignore, or numbers that are 0 (attend)
            or minus infinity (ignore), as torch's own encoder makes of a bool mask. Numbers are read on the host.
        batch: B.
        length: S.

    Raises:
        InputError: another shape or dtype.
        CapabilityError: numbers that are neither 0 nor minus infinity; they would be added to logits.
    """
    if key_padding_mask is None:
        return None
    mask = key_padding_mask[None] if key_padding_mask.dim() == 1 else key_padding_mask
    if mask.shape != (batch, length):
        raise InputError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; wanted ({batch}, {length}), batch and keys"
        )
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise InputError(
            f"key_padding_mask has dtype {mask.dtype}; wanted bool with True = ignore, or floats that are 0 or -inf"
        )
    attended = mask == 0
    if not bool((attended | (mask == -torch.inf)).all()):
        raise CapabilityError(
            "key_padding_mask holds numbers other than 0 and -inf, which torch would add to the logits; a mechanism "
            "takes or leaves a key: pass a bool mask, or use torch.nn.MultiheadAttention"
        )
    return attended


def is_causal_of(attn_mask: Tensor | None, is_causal: bool, num_queries: int, num_keys: int) -> bool:
    """Whether a mask over queries and keys is the causal one.

    ``is_causal=True`` without a mask says all; a mask is read on the host, at a cost that grows with N x S.

    Args:
        attn_mask: (N, S); bool with True = ignore, or numbers that are 0 or minus infinity.
        is_causal: torch's hint; a mask that is not causal contradicts it.
        num_queries: N.
        num_keys: S.

    Raises:
        InputError: a hint that the mask contradicts.
        CapabilityError: any other mask.
    """
    if attn_mask is None:
        return is_causal
    if attn_mask.shape == (num_queries, num_keys) and num_queries <= num_keys:
        ignored = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        plain = attn_mask.dtype == torch.bool or bool((ignored | (attn_mask == 0)).all())
        later = torch.ones_like(ignored, dtype=torch.bool).triu_(num_keys - num_queries + 1)
        if plain and torch.equal(ignored, later):
            return True
        if plain and not is_causal and not bool(ignored.any()):
            return False
    if is_causal:
        raise InputError(
            f"is_causal=True, but attn_mask {tuple(attn_mask.shape)} is not the causal mask of {num_queries} "
            "queries and "
            f"{num_keys} keys, the last query aligned with the last key; pass is_causal=True without attn_mask"
        )
    raise CapabilityError(
        f"attn_mask has shape {tuple(attn_mask.shape)} and dtype {attn_mask.dtype}; a mechanism of linear cost never "
        f"makes the {num_queries} x {num_keys} weights it would apply to: pass is_causal=True, or key_padding_mask for "
        "masks over keys, or use torch.nn.MultiheadAttention"
    )
