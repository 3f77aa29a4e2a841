"""Calls of ``torch.nn.functional.scaled_dot_product_attention`` within one module, answered by its mechanism.

The module's own ``forward`` runs, whatever it does to q, k and v before (norms, rotary positions) and to the output
after. Its instance only gets a ``forward`` in front of that of its class; without it, it is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maclin.adopt.hosts.base import MECHANISM, AttentionCall
from maclin.core.errors import CapabilityError

_FUSED = nn.functional.scaled_dot_product_attention

WATCHED: ContextVar[bool] = ContextVar("maclin_watched", default=False)
"""Whether a model is being watched, so that its own attention is to answer."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of ``scaled_dot_product_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def own(self) -> Tensor:
        """What torch answers."""
        return _FUSED(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


class Intercept(TorchFunctionMode):
    """Has ``answer`` called in place of ``scaled_dot_product_attention``.

    Args:
        answer: from arguments to output.
    """

    def __init__(self, answer: Callable[[Arguments], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _FUSED:
            return self.answer(Arguments(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def redirected(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` of a converted module: that of its class, with the module's mechanism for attention."""
    if WATCHED.get():
        return type(module).forward(module, *args, **kwargs)
    with Intercept(partial(attend, module)):
        return type(module).forward(module, *args, **kwargs)


def attend(module: nn.Module, given: Arguments) -> Tensor:
    """The mechanism's output in place of the fused attention's.

    Raises:
        CapabilityError: the call cannot be answered faithfully; the message says why and what to do.
    """
    mechanism: Any = module._modules[MECHANISM]
    called = f"a {type(module).__name__}"
    if given.dropout_p > 0:
        if mechanism.name == "softmax":
            return given.own()
        raise CapabilityError(
            f"{called}: {mechanism.name} has no attention weights to drop, and the model is in train mode with an "
            f"attention dropout of {given.dropout_p}; set its attention dropout to 0, or call model.eval()"
        )
    call = as_call(called, given)
    return mechanism(call.q, call.k, call.v, key_mask=call.key_mask, is_causal=call.is_causal, scale=call.scale)


def as_call(layer: str, given: Arguments) -> AttentionCall:
    """A call in the contract of a mechanism.

    Raises:
        CapabilityError: the call asks for more than softmax(scale q kᵀ) v over unpadded keys, causal or not.
    """
    reason = reason_against(given)
    if reason is not None:
        raise CapabilityError(
            f"{layer} cannot be replaced faithfully: {reason}; leave this layer out of the conversion"
        )
    mask, (batch, keys) = given.attn_mask, (given.key.shape[0], given.key.shape[2])
    if mask is not None:
        mask = mask.expand(batch, 1, 1, keys)[:, 0, 0]
        mask = mask if mask.dtype == torch.bool else mask == 0
    crossed = given.query.shape[2] != keys
    return AttentionCall(layer, given.query, given.key, given.value, mask, given.is_causal, _scale(given), crossed)


def reason_against(given: Arguments) -> str | None:
    """Why a call is not softmax(scale q kᵀ) v over unpadded keys; None where it is."""
    q, k, mask = given.query, given.key, given.attn_mask
    if q.is_nested or k.is_nested:
        return "it is given nested tensors"
    if q.dim() != 4 or k.dim() != 4:
        return f"its q has {q.dim()} dimensions, and (batch, heads, tokens, width) is understood"
    if q.shape[1] != k.shape[1] and not given.enable_gqa:
        return f"it has {q.shape[1]} heads of q and {k.shape[1]} of k without enable_gqa"
    if given.is_causal and (mask is not None or q.shape[2] != k.shape[2]):
        return "it is causal, and has a mask beside it or another number of keys than of queries"
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return "its attn_mask is more than padding of keys (a bias of positions, a window or blocks)"
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= -1e4)).all()):
        return "its attn_mask adds a bias to its logits"
    return None


def _scale(given: Arguments) -> float | None:
    if given.scale is None or abs(given.scale * given.query.shape[-1] ** 0.5 - 1.0) < 1e-6:
        return None
    return float(given.scale)
