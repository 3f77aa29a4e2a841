"""attention(): the signature of torch's scaled_dot_product_attention, plus ``mechanism=``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import CapabilityError, InputError
from .mechanisms import Mechanism, row
from .mechanisms import mechanism as build


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mechanism: str | Mechanism = "revisited_linformer",
    **options: Any,
) -> Tensor:
    """Attention by any mechanism, called as ``torch.nn.functional.scaled_dot_product_attention``.

    A mechanism that is named is built for this call; one that draws uses a generator with seed 0 unless
    ``generator`` is given, so that equal calls give equal results. Build it once with ``maclin.mechanism`` where
    it is called often or learns.

    Args:
        query: (B, H, N, D).
        key: (B, Hk, S, D).
        value: (B, Hk, S, Dv).
        attn_mask: bool, True = attend, over keys only: any shape that broadcasts to (B, 1, 1, S).
        dropout_p: only 0 unless the mechanism is "softmax", as for torch applied at every call.
        is_causal: as in the contract; the last query is aligned with the last key (torch aligns the first).
        scale: None is 1/sqrt(D) where logits exist.
        enable_gqa: needed where Hk < H, as for torch.
        mechanism: a name, or a built mechanism.
        options: of the named mechanism.

    Returns:
        (B, H, N, Dv).

    Raises:
        InputError: shapes or dtypes that do not fit.
        CapabilityError: a mask that is not over keys, dropout, or what the mechanism lacks.
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise InputError(
            f"attention: query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; wanted 4 each: "
            "(batch, heads, tokens, width)"
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not enable_gqa:
        raise InputError(
            f"attention: query has {heads} heads and key {key_heads}; pass enable_gqa=True if heads are shared"
        )
    if isinstance(mechanism, Mechanism):
        if options:
            raise InputError(f"attention: options {sorted(options)} are for a named mechanism, got a built one")
        if dropout_p:
            raise CapabilityError(
                f"attention: dropout_p={dropout_p} with a built mechanism; pass dropout_p=0, or build "
                "maclin.mechanism('softmax', dropout_p=...)"
            )
        built = mechanism
    else:
        if mechanism == "softmax":
            options = {"dropout_p": dropout_p, **options}
        elif dropout_p:
            raise CapabilityError(
                f"attention: {mechanism} has no dropout of weights, since it never makes them; pass dropout_p=0 or "
                "mechanism='softmax'"
            )
        options = _seeded(mechanism, options)
        built = build(mechanism, head_dim=query.shape[3], num_heads=heads, num_kv_heads=key_heads, **options)
        built = built.to(query.device)
    out = built(query, key, value, key_mask=_key_mask(attn_mask, key), is_causal=is_causal, scale=scale)
    if not isinstance(out, Tensor):
        raise InputError("attention: the mechanism returned a state that was not asked for")
    return out


def _seeded(name: str, options: dict[str, Any]) -> dict[str, Any]:
    if not row(name).takes_generator or options.get("generator") is not None:
        return options
    return {**options, "generator": torch.Generator().manual_seed(0)}


def _key_mask(attn_mask: Tensor | None, key: Tensor) -> Tensor | None:
    if attn_mask is None:
        return None
    batch, length = key.shape[0], key.shape[2]
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    over_keys = len(shape) == 4 and shape[0] in (1, batch) and shape[1:3] == (1, 1) and shape[3] in (1, length)
    if attn_mask.dtype != torch.bool or not over_keys:
        raise CapabilityError(
            f"attention: attn_mask has shape {tuple(attn_mask.shape)} and dtype {attn_mask.dtype}; a mechanism of "
            f"linear cost takes bool masks over keys only, ({batch}, 1, 1, {length}); for others use "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    return attn_mask.reshape(shape)[:, 0, 0].expand(batch, length)
