"""TransformerDecoderLayer: torch's module of that name, over any mechanism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import OptionError
from ..core.mechanisms import Mechanism
from ..core.mechanisms.base import State
from .attention import MultiheadAttention
from .encoder_layer import Layer
from .positions import Rotation


class TransformerDecoderLayer(Layer):
    """Self-attention, attention to a memory, feed-forward: a drop-in for ``torch.nn.TransformerDecoderLayer``.

    As ``TransformerEncoderLayer``, with parameter names of torch's decoder layer.

    Args:
        d_model: E, width of input, memory and output.
        nhead: H, heads.
        dim_feedforward: width of the feed-forward network.
        dropout: after each block and within the feed-forward network; attention weights too with "softmax".
        activation: "relu", "gelu" or a function.
        layer_norm_eps: of the three norms.
        batch_first: whether inputs are (B, N, E) instead of (N, B, E).
        norm_first: norms before the blocks instead of after the sums.
        bias: whether projections and norms have one.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: Hk, heads of keys and values (default H).
        mechanism: of self-attention: a name, or a built mechanism.
        cross_mechanism: of attention to the memory; None is the same by name, with the same options.
        position: "rotary" or None, of self-attention.
        attention_dropout: of attention weights, instead of ``dropout``; above 0 with "softmax" only.
        cross_options: of the named ``cross_mechanism``.
        options: of the named ``mechanism``.

    Raises:
        OptionError: sizes or options that cannot be; a built mechanism without a ``cross_mechanism``.
        CapabilityError: what the mechanism lacks.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        mechanism: str | Mechanism = "macformer",
        cross_mechanism: str | Mechanism | None = None,
        position: Literal["rotary"] | None = None,
        attention_dropout: float | None = None,
        cross_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, dim_feedforward, dropout, activation, norm_first)
        if cross_mechanism is None:
            if isinstance(mechanism, Mechanism) or cross_options is not None:
                raise OptionError(
                    "cross_mechanism is None; wanted one, since "
                    + (
                        "a built mechanism serves one attention only"
                        if cross_options is None
                        else "cross_options is given"
                    )
                )
            cross_mechanism, cross_options = mechanism, options
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = {"batch_first": batch_first, "num_kv_heads": num_kv_heads, **factory}
        own, cross = (self._attention_dropout(attention_dropout, dropout, m) for m in (mechanism, cross_mechanism))
        self.self_attn = MultiheadAttention(
            d_model, nhead, own, bias, mechanism=mechanism, position=position, **shared, **options
        )
        self.multihead_attn = MultiheadAttention(
            d_model, nhead, cross, bias, mechanism=cross_mechanism, **shared, **(cross_options or {})
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm3 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer as torch calls it.

        Args:
            tgt: (N, B, E), or (B, N, E) with ``batch_first``, or (N, E).
            memory: (S, B, E), (B, S, E) or (S, E).
            tgt_mask: only the causal mask; ``tgt_is_causal=True`` alone says the same.
            memory_mask: only a causal mask.
            tgt_key_padding_mask: (B, N) or (N,), True = ignore.
            memory_key_padding_mask: (B, S) or (S,), True = ignore.
            tgt_is_causal: each token attends to those up to its own position.
            memory_is_causal: the same for the memory.

        Returns:
            As tgt.
        """

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x,
                x,
                x,
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                need_weights=False,
                is_causal=tgt_is_causal,
            )
            return self.dropout1(out)

        def look(x: Tensor) -> Tensor:
            out, _ = self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                is_causal=memory_is_causal,
            )
            return self.dropout2(out)

        x = self._residual(self._residual(tgt, self.norm1, attend), self.norm2, look)
        return self._residual(x, self.norm3, self._feed_forward)

    def decode(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """The layer, causal, as mechanisms are called: x (B, N, E), memory (B, S, E), True = attend.

        Returns:
            x, and the state of self-attention or None.
        """
        new_state: State | None = None

        def attend(x: Tensor) -> Tensor:
            nonlocal new_state
            out, new_state = self.self_attn.attend(
                x,
                x,
                x,
                key_mask=key_mask,
                is_causal=True,
                rotation=rotation,
                state=state,
                return_state=return_state,
            )
            return self.dropout1(out)

        def look(x: Tensor) -> Tensor:
            out, _ = self.multihead_attn.attend(x, memory, memory, key_mask=memory_mask)
            return self.dropout2(out)

        x = self._residual(self._residual(x, self.norm1, attend), self.norm2, look)
        return self._residual(x, self.norm3, self._feed_forward), new_state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))
