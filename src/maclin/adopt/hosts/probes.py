"""Two probes for transformers models: one finds the attention layers, one shows what they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts import interface
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer
from maclin.adopt.hosts.common import reason_against_weights

_CROSS = ("crossattention", "encoder_attn", "encdecattention", "cross_attn")
"""In the names of cross-attention modules or of their classes."""


def is_cross(module: nn.Module, name: str) -> bool:
    """Whether a module is named as one whose keys come from another sequence, or says so of itself."""
    labels = (type(module).__name__.lower(), name.lower().rpartition(".")[2])
    said = getattr(module, "is_cross_attention", False)
    return bool(said) or any(mark in label for mark in _CROSS for label in labels)


class Discovery:
    """Finds the attention modules of a model, and what speaks against replacing each."""

    def __init__(self, root: nn.Module) -> None:
        self.names = {module: name for name, module in root.named_modules()}
        self.found: dict[nn.Module, AttentionLayer] = {}
        self.masks: list[tuple[Tensor, bool | None]] = []  # with causal or not, None where neither says it all

    def mask(self, **kwargs: Any) -> Tensor | None:
        """The mask, of which is kept whether it is more than padding and causality; never None where it is not."""
        plain = interface.is_plain(kwargs)
        made = interface.key_mask(kwargs) if plain else interface.mask(**kwargs)
        if made is None:
            shape = (kwargs["batch_size"], kwargs["kv_length"])
            made = torch.ones(shape, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        function = kwargs.get("mask_function", interface.causal_mask_function)
        self.masks.append((made, (function is interface.causal_mask_function) if plain else None))
        return made

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The host's own output; the module is noted with its sizes and what speaks against replacing it."""
        seen = self.found.get(module)
        if seen is not None:
            self.found[module] = replace(seen, calls=seen.calls + 1)
        elif module in self.names:
            causal = interface.causal_flag(module, kwargs.get("is_causal"))
            crossed = query.shape[2] != key.shape[2] or is_cross(module, self.names[module])
            self.found[module] = AttentionLayer(
                name=self.names[module],
                module=module,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_dim=query.shape[-1],
                value_dim=value.shape[-1],
                is_causal=causal,
                refused=self._reason(module, query, key, value, attention_mask, causal, kwargs, crossed),
                is_cross=crossed,
            )
        return interface.exact(module, query, key, value, attention_mask, **kwargs)

    def _reason(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        causal: bool,
        kwargs: dict[str, Any],
        crossed: bool,
    ) -> str | None:
        reason = interface.reason_against(kwargs) or reason_against_weights(module)
        if reason is not None:
            return reason
        if crossed and causal:
            return "its keys come from another sequence, and yet it is causal"
        if attention_mask is not None:
            causal_masks = [says for made, says in self.masks if made is attention_mask]
            if not causal_masks:
                return "the model builds its attention mask itself, outside transformers' mask interface"
            if causal_masks[0] is None:
                return "its mask is more than padding and causality (a sliding window, packed sequences or an overlay)"
            if causal_masks[0] != causal:
                return f"its is_causal flag ({causal}) and its mask ({causal_masks[0]}) disagree"
        if not _is_softmax(module, query, key, value, attention_mask, causal, kwargs):
            return "its own attention is not softmax(scale q kᵀ) v"
        return None


class Observation:
    """Shows every call of the named modules to a callback."""

    def __init__(self, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        self.names = names
        self.callback = callback

    def mask(self, **kwargs: Any) -> Tensor | None:
        """The mask of a converted model."""
        return interface.mask(**kwargs)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The host's own output, after the callback has seen what it is made of."""
        name = self.names.get(module)
        if name is not None:
            scaling, is_causal = kwargs.get("scaling"), kwargs.get("is_causal")
            call = interface.as_call(module, name, query, key, value, attention_mask, scaling, is_causal, kwargs)
            crossed = query.shape[2] != key.shape[2] or is_cross(module, name)
            self.callback(replace(call, is_cross=crossed))
        return interface.exact(module, query, key, value, attention_mask, **kwargs)


def _is_softmax(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the host's eager function computes what a mechanism is measured against, on these inputs."""
    eager = interface.eager_function(module)
    if eager is None:
        return True
    q, k, v = query.float(), key.float(), value.float()
    allowed = interface.dense_mask(attention_mask, causal, q, k)
    options = {**kwargs, "dropout": 0.0}
    theirs = eager(module, q, k, v, interface.additive(allowed, q.dtype), **options)[0]
    groups = q.shape[1] // k.shape[1]
    ours = nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(groups, 1),
        v.repeat_interleave(groups, 1),
        attn_mask=allowed,
        scale=kwargs.get("scaling"),
    ).transpose(1, 2)
    difference = (theirs - ours).abs()
    if allowed is not None:  # a row that may attend to nothing is nobody's business
        difference = difference * allowed.any(-1).transpose(1, 2)[..., None]
    limit = 1e-3 * ours.nan_to_num(0.0, 0.0, 0.0).abs().max() + 1e-6
    return bool(difference.nan_to_num(0.0, 0.0, 0.0).max() <= limit)  # what is not finite is found at capture
