"""TransformerEncoderLayer: torch's module of that name, over any mechanism; and what the decoder layer shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import OptionError
from ..core.mechanisms import Mechanism
from ..core.mechanisms.base import State
from .attention import MultiheadAttention
from .positions import Rotation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def activation_of(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of that name, or the function itself; raises OptionError for unknown names."""
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise OptionError(
            f"activation is {activation!r}; known are {', '.join(repr(a) for a in ACTIVATIONS)}, or pass a function"
        )
    return ACTIVATIONS[activation]


class Layer(nn.Module):
    """What both layers share: the feed-forward network, norms and where they stand, dropout."""

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout: float,
        activation: str | Callable[[Tensor], Tensor],
        norm_first: bool,
    ) -> None:
        super().__init__()
        if dim_feedforward < 1:
            raise OptionError(f"dim_feedforward is {dim_feedforward}; wanted a positive integer")
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout is {dropout}; wanted a probability in [0, 1)")
        self.d_model = d_model
        self.norm_first = norm_first
        self.activation = activation_of(activation)

    @staticmethod
    def _attention_dropout(given: float | None, dropout: float, mechanism: str | Mechanism) -> float:
        """What the attention gets: torch's one ``dropout`` reaches attention weights where there are any."""
        if given is not None:
            return given
        return dropout if mechanism == "softmax" else 0.0

    def _residual(self, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        return x + block(norm(x)) if self.norm_first else norm(x + block(x))


class TransformerEncoderLayer(Layer):
    """Self-attention and a feed-forward network, a drop-in for ``torch.nn.TransformerEncoderLayer``.

    Constructor, parameter names and call are torch's, so checkpoints load both ways, and
    ``torch.nn.TransformerEncoder`` takes it (with ``enable_nested_tensor=False``, or it warns). Masks mean what they
    mean in torch (True = ignore); see ``MultiheadAttention`` for what differs.

    Args:
        d_model: E, width of input and output.
        nhead: H, heads.
        dim_feedforward: width of the feed-forward network.
        dropout: after attention, within and after the feed-forward network; attention weights too with
            mechanism="softmax".
        activation: "relu", "gelu" or a function.
        layer_norm_eps: of both norms.
        batch_first: whether inputs are (B, N, E) instead of (N, B, E).
        norm_first: norms before attention and feed-forward (pre-norm) instead of after the sum.
        bias: whether projections and norms have one.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: Hk, heads of keys and values (default H).
        mechanism: a name, or a built mechanism.
        position: "rotary" or None.
        attention_dropout: of attention weights, instead of ``dropout``; above 0 with "softmax" only.
        options: of the named mechanism.

    Raises:
        OptionError: sizes or options that cannot be.
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
        position: Literal["rotary"] | None = None,
        attention_dropout: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, dim_feedforward, dropout, activation, norm_first)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model,
            nhead,
            self._attention_dropout(attention_dropout, dropout, mechanism),
            bias,
            batch_first=batch_first,
            num_kv_heads=num_kv_heads,
            mechanism=mechanism,
            position=position,
            **factory,
            **options,
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer as torch calls it.

        Args:
            src: (N, B, E), or (B, N, E) with ``batch_first``, or (N, E).
            src_mask: only the causal mask; ``is_causal=True`` alone says the same.
            src_key_padding_mask: (B, N) or (N,), True = ignore.
            is_causal: each token attends to those up to its own position.

        Returns:
            As src.
        """

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )
            return self.dropout1(out)

        return self._residual(self._residual(src, self.norm1, attend), self.norm2, self._feed_forward)

    def encode(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        rotation: Rotation | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """The layer as mechanisms are called: x (B, N, E), True = attend; returns x and the state, or None."""
        new_state: State | None = None

        def attend(x: Tensor) -> Tensor:
            nonlocal new_state
            out, new_state = self.self_attn.attend(
                x,
                x,
                x,
                key_mask=key_mask,
                is_causal=is_causal,
                rotation=rotation,
                state=state,
                return_state=return_state,
            )
            return self.dropout1(out)

        x = self._residual(self._residual(x, self.norm1, attend), self.norm2, self._feed_forward)
        return x, new_state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
