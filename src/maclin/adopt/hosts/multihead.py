"""The class that a ``torch.nn.MultiheadAttention`` takes on while it is converted or watched.

Only the class of the module changes: weights, buffers, hooks and whoever holds the module stay as they are, and taking
the class back restores it to the bit. torch's encoder layers take a fused path in evaluation that never calls
``self_attn``; they are kept from it by ``_qkv_same_embed_dim``, which they read before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts.base import MECHANISM, AttentionCall
from maclin.core.errors import CapabilityError

_FAR = -1e4  # what is added to a logit to say: not this key

Output = tuple[Tensor, Tensor | None]
Probe = Callable[["ConvertedMultiheadAttention", "Given", bool, Callable[[], Output]], Output]
"""Stands in for attention while a model is watched; given are module, arguments, whether weights are wanted, and a way
to the module's own output."""

ACTIVE_PROBE: ContextVar[Probe | None] = ContextVar("maclin_multihead_probe", default=None)


@dataclass(frozen=True)
class Given:
    """What one call of a ``MultiheadAttention`` was given, as it was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool

    @property
    def is_cross(self) -> bool:
        """Whether keys come from another tensor than queries."""
        return self.query is not self.key


class ConvertedMultiheadAttention(nn.MultiheadAttention):
    """A ``MultiheadAttention`` whose mechanism answers, and its own attention where it holds none.

    The second result is None, whatever ``need_weights`` says: a mechanism forms no weights. ``is_causal`` without
    ``attn_mask`` is causal. A query that may attend to nothing gives the bias of the output projection.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False  # what torch's fused paths want to be True; the real one is in __dict__

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        """Attention with the arguments of ``MultiheadAttention.forward``.

        Raises:
            CapabilityError: the call cannot be answered faithfully; the message says why and what to do.
        """
        given = Given(query, key, value, key_padding_mask, attn_mask, is_causal)

        def own() -> Output:
            mask = _past(query, key, self.batch_first) if is_causal and attn_mask is None else attn_mask
            host: Any = _AsItWas(self)
            return nn.MultiheadAttention.forward(
                host, query, key, value, key_padding_mask, need_weights, mask, average_attn_weights, is_causal
            )

        probe = ACTIVE_PROBE.get()
        if probe is not None:
            return probe(self, given, need_weights, own)
        mechanism: Any = self._modules.get(MECHANISM)
        if mechanism is None:
            return own()
        if self.dropout > 0 and self.training:
            if mechanism.name == "softmax":
                return own()[0], None
            raise CapabilityError(
                f"{_called(self)}: {mechanism.name} has no attention weights to drop, and the model is in train mode "
                f"with an attention dropout of {self.dropout}; set its dropout to 0.0, or call model.eval()"
            )
        call = as_call(self, _called(self), given)
        out = mechanism(call.q, call.k, call.v, key_mask=call.key_mask, is_causal=call.is_causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None


class _AsItWas:
    """A converted module as ``MultiheadAttention.forward`` is to see it."""

    def __init__(self, module: ConvertedMultiheadAttention) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        own = self._module.__dict__
        return own[name] if name in own else getattr(self._module, name)


def as_call(module: nn.MultiheadAttention, layer: str, given: Given, trusting: bool = True) -> AttentionCall:
    """A call of the host in the contract of a mechanism.

    Args:
        module: the module that was called.
        layer: its name, for the call and for messages.
        given: what it was called with.
        trusting: whether ``is_causal`` beside a square mask is believed, as torch does; else the mask is looked at.

    Raises:
        CapabilityError: the call asks for more than softmax(scale q kᵀ) v over unpadded keys, causal or not.
    """
    if any(x.is_nested for x in (given.query, given.key, given.value)):
        raise CapabilityError(f"{layer} is given nested tensors; pass padded ones with a key_padding_mask")
    q, k, v = _heads(module, given)
    key_mask, reason = _key_mask(given)
    causal = False
    if reason is None:
        causal, reason = _causality(given, q.shape[2], k.shape[2], trusting)
    if reason is not None:
        raise CapabilityError(
            f"{layer} cannot be replaced faithfully: {reason}; leave this layer out of the conversion"
        )
    return AttentionCall(layer, q, k, v, key_mask, causal, None, given.is_cross)


def reason_against_call(module: nn.MultiheadAttention, given: Given) -> tuple[str | None, bool]:
    """Why a call is not softmax(scale q kᵀ) v over unpadded keys, None where it is; and whether it is causal."""
    if module.bias_k is not None or module.bias_v is not None:
        return "it appends learned biases to its keys and values (add_bias_kv)", False
    if module.add_zero_attn:
        return "it appends a key and a value of zeros (add_zero_attn)", False
    _, reason = _key_mask(given)
    if reason is not None:
        return reason, False
    along = 0 if given.query.dim() == 2 else int(module.batch_first)
    causal, reason = _causality(given, given.query.shape[along], given.key.shape[along], trusting=False)
    return reason, causal


def _key_mask(given: Given) -> tuple[Tensor | None, str | None]:
    """(B, S) bool with True = attend; or why there is none: torch adds a float mask to its logits."""
    mask = given.key_padding_mask
    if mask is None:
        return None, None
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.dtype == torch.bool:
        return ~mask, None
    keys = mask == 0
    if _certainly((keys | (mask <= _FAR)).all()):
        return keys, None
    return None, "its key_padding_mask adds other numbers to its logits than 0 and -inf"


def _causality(given: Given, n: int, s: int, trusting: bool) -> tuple[bool, str | None]:
    """Whether a call is causal, the last query aligned with the last key; or why it is neither causal nor free."""
    mask = given.attn_mask
    if mask is None or (trusting and given.is_causal and n == s):
        return given.is_causal, None
    if mask.dim() != 2:
        return False, "it is given a mask per sequence and head (attn_mask of three dimensions)"
    barred = mask if mask.dtype == torch.bool else mask <= _FAR
    if mask.dtype != torch.bool and not _certainly((barred | (mask == 0)).all()):
        return False, "its attn_mask adds a bias to its logits"
    if not barred.any():
        return False, None
    future = torch.ones_like(barred).triu(1 + s - n)
    if n <= s and _certainly((barred == future).all()):
        return True, None
    return False, "its attn_mask is more than causality (a window, packed sequences or blocks)"


def _certainly(condition: Tensor) -> bool:
    """A condition on values as a number; where a graph is traced it is left to be checked as the graph runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, "a mask is not what this model was traced with")  # pyright: ignore[reportPrivateImportUsage]
        return True
    return bool(condition)


def _heads(module: nn.MultiheadAttention, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, H, S, D) from the module's projections."""
    query, key, value = given.query, given.key, given.value
    width, bias = module.embed_dim, module.in_proj_bias
    weight: Tensor | None = module.in_proj_weight
    if weight is not None and query is key and key is value:
        q, k, v = nn.functional.linear(query, weight, bias).chunk(3, dim=-1)
    else:
        weights = (
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            if weight is None
            else weight.split(width)
        )
        biases = (None, None, None) if bias is None else bias.split(width)
        q, k, v = (nn.functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return tuple(_by_head(x, module.num_heads, module.batch_first) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def _by_head(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    if x.dim() == 2:
        x = x[None]
    elif not batch_first:
        x = x.transpose(0, 1)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _past(query: Tensor, key: Tensor, batch_first: bool) -> Tensor:
    along = 0 if query.dim() == 2 else int(batch_first)
    n, s = query.shape[along], key.shape[along]
    return torch.ones(n, s, dtype=torch.bool, device=query.device).triu(1 + s - n)


def _called(module: nn.MultiheadAttention) -> str:
    return f"a MultiheadAttention of {module.num_heads} heads and width {module.embed_dim}"
