"""The functions that maclin registers with transformers: attention, its mask, and the probe that watches both.

transformers looks an attention function and a mask function up by name at every call. Under the name
``maclin`` the mask stays two-dimensional, (B, S) with True = attend, or None where nothing is padded, so that
no layer ever sees an N x N mask; a mask that is not of this kind (packed sequences, a sliding window, an
overlay, a static cache) is made as the host makes it, and a converted layer that is given one refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from maclin.adopt.hosts.base import MECHANISM, AttentionCall
from maclin.adopt.hosts.cache import layer_of, new_keys
from maclin.core.errors import CapabilityError, InputError

NAME = "maclin"
PROBE = "maclin_probe"

_EXTRAS = {
    "position_bias": "it adds a position bias to its logits",
    "softcap": "it caps its logits (softcap)",
    "s_aux": "it has attention sinks (s_aux)",
    "head_mask": "it is given a mask per head (head_mask)",
}
"""Arguments that change the formula, with what to say; the host's eager function is the one that knows them."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seq_idx")


class Probe(Protocol):
    """Stands in for attention and mask while a model is watched."""

    def mask(self, **kwargs: Any) -> Tensor | None:
        """The mask of one forward pass, from the arguments of transformers' mask functions."""
        ...

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The output (B, N, H, Dv) of one attention module."""
        ...


ACTIVE_PROBE: ContextVar[Probe | None] = ContextVar("maclin_probe", default=None)


def is_plain(arguments: dict[str, Any]) -> bool:
    """Whether the mask that these arguments describe is padding of keys, causal (bottom-right) or not, and no more."""
    function = arguments.get("mask_function", causal_mask_function)
    if function is bidirectional_mask_function:
        aligned = True
    elif function is causal_mask_function:
        last = int(arguments.get("q_offset", 0)) + arguments["q_length"]
        aligned = last == arguments["kv_length"]  # else keys behind the last query: a static cache
    else:
        return False
    return aligned and arguments.get("local_size") is None and not int(arguments.get("kv_offset", 0))


def mask(**kwargs: Any) -> Tensor | None:
    """(B, S) bool, True = attend, or None where nothing is padded; the host's own 4-D mask where that cannot say it."""
    if not is_plain(kwargs):
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    keys = key_mask(kwargs)
    if keys is None or (not torch.compiler.is_compiling() and bool(keys.all())):
        return None
    return keys


def key_mask(arguments: dict[str, Any]) -> Tensor | None:
    """The padding mask (B, S) among the arguments of a mask function, None where there is none."""
    given: Tensor | None = arguments.get("attention_mask")
    if given is None:
        return None
    keys = given.to(torch.bool)[:, : arguments["kv_length"]]
    missing = arguments["kv_length"] - keys.shape[1]
    if missing > 0:
        keys = nn.functional.pad(keys, (0, missing))
    return keys.expand(arguments["batch_size"], -1)


def causal_flag(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether a module's attention is causal, by the rule of transformers' own functions."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def own_scale(scaling: float | None, head_dim: int) -> float | None:
    """The scale to ask of a mechanism: None where the host uses 1/sqrt(D), so that each applies its own default."""
    if scaling is None or abs(scaling * head_dim**0.5 - 1.0) < 1e-6:
        return None
    return float(scaling)


def reason_against(kwargs: dict[str, Any]) -> str | None:
    """Why a call with these arguments is not softmax(scale q kᵀ) v over unpadded keys; None where it is."""
    for argument, reason in _EXTRAS.items():
        if kwargs.get(argument) is not None:
            return reason
    if kwargs.get("sliding_window") is not None:
        return f"it looks through a sliding window of {kwargs['sliding_window']} tokens"
    if any(kwargs.get(argument) is not None for argument in _PACKED):
        return "it is given packed sequences"
    return None


def dense_mask(attention_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The 4-D bool mask that ``mask`` left out, True = attend; None where all may attend to all."""
    n, s = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.dim() != 2:
        return attention_mask
    full = None if attention_mask is None else attention_mask[:, None, None, :]
    if is_causal and n > 1:
        past = torch.ones(n, s, dtype=torch.bool, device=query.device).tril(s - n)
        full = past[None, None] if full is None else full & past
    return full


def eager_function(module: nn.Module) -> Callable[..., tuple[Tensor, Any]] | None:
    """The eager attention of the file that defines the module's class, which knows every argument of its own."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def additive(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as what eager attention adds to its logits."""
    if allowed is None or allowed.dtype != torch.bool:
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The host's own attention under the masks of ``mask``: for layers that stay as they were."""
    causal = causal_flag(module, is_causal)
    eager = eager_function(module) if any(kwargs.get(argument) is not None for argument in _EXTRAS) else None
    if eager is not None:
        full = additive(dense_mask(attention_mask, causal, query, key), query.dtype)
        out = eager(module, query, key, value, full, scaling=scaling, dropout=dropout, **kwargs)[0]
        return out, None
    simple = attention_mask is None and (not causal or query.shape[2] in (1, key.shape[2]))
    full = None if simple else dense_mask(attention_mask, causal, query, key)
    out, _ = sdpa_attention_forward(
        module, query, key, value, full, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )
    return out, None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a converted model: the module's mechanism, or the host's own where it has none.

    Args:
        module: the attention module that calls.
        query: (B, H, N, D).
        key: (B, Hk, S, D), heads not repeated.
        value: (B, Hk, S, Dv).
        attention_mask: what ``mask`` made.
        scaling: factor of the logits; None is 1/sqrt(D).
        dropout: probability of dropping an attention weight.
        is_causal: overrides the module's own flag.
        kwargs: whatever else this architecture passes; refused where it changes the attention.

    Returns:
        out (B, N, H, Dv), and None in place of attention weights.

    Raises:
        CapabilityError: the call cannot be answered faithfully; the message says why and what to do.
    """
    mechanism: Any = module._modules.get(MECHANISM)
    if mechanism is None or (dropout > 0 and module.training and mechanism.name == "softmax"):
        return exact(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs)
    if dropout > 0 and module.training:
        raise CapabilityError(
            f"{_called(module)}: {mechanism.name} has no attention weights to drop, and the model is in train mode "
            f"with an attention dropout of {dropout}; set the attention dropout to 0 (in BERT: "
            "attention_probs_dropout_prob=0), or call model.eval()"
        )
    cached = layer_of(key)
    if cached is not None:
        attention_mask = new_keys(attention_mask, key)
    call = as_call(module, _called(module), query, key, value, attention_mask, scaling, is_causal, kwargs)
    if cached is not None:
        out = cached.attend(mechanism, call)
    else:
        out = mechanism(call.q, call.k, call.v, key_mask=call.key_mask, is_causal=call.is_causal, scale=call.scale)
    return out.transpose(1, 2).contiguous(), None


def as_call(
    module: nn.Module,
    layer: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """A call of the host in the contract of a mechanism.

    Raises:
        CapabilityError: the call asks for more than softmax(scale q kᵀ) v over unpadded keys.
    """
    reason = reason_against(kwargs)
    if reason is not None:
        raise CapabilityError(
            f"{layer} cannot be replaced faithfully: {reason}; leave this layer out of the conversion"
        )
    if kwargs.get("output_attentions"):
        raise CapabilityError(no_weights())
    if attention_mask is not None and attention_mask.dim() != 2:
        raise CapabilityError(
            f"{layer}: wanted a padding mask (batch, keys), got a mask of shape {tuple(attention_mask.shape)}, as made "
            "for packed sequences, a sliding window, a static cache or by hand; pass one sequence per row with a 2-D "
            "attention_mask and the default (dynamic) cache, or restore the model first"
        )
    if attention_mask is not None and attention_mask.shape != (key.shape[0], key.shape[2]):
        raise InputError(
            f"{layer}: attention_mask has shape {tuple(attention_mask.shape)}; wanted {(key.shape[0], key.shape[2])}, "
            "one entry per key"
        )
    keys = None if attention_mask is None else attention_mask.to(torch.bool)
    scale = own_scale(scaling, query.shape[-1])
    return AttentionCall(layer, query, key, value, keys, causal_flag(module, is_causal), scale)


def no_weights() -> str:
    """What to say to whoever asks a converted model for its attention weights."""
    return (
        "output_attentions=True asks for attention weights, which a converted model never forms; "
        "leave it out, or call maclin.restore_(model) first"
    )


def _called(module: nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__} of layer {index}"


def _probe() -> Probe:
    probe = ACTIVE_PROBE.get()
    if probe is None:
        raise CapabilityError(
            f"the attention implementation {PROBE!r} is maclin's own; use {NAME!r} via maclin.convert_"
        )
    return probe


def _probe_mask(**kwargs: Any) -> Tensor | None:
    return _probe().mask(**kwargs)


def _probe_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _probe().attention(module, *args, **kwargs)


# At import, so that a converted model that was pickled works again as soon as it is loaded.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)
