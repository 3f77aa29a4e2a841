"""The stack of layers inside every model: positions, layers, last norm, and the state between steps."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core import mechanisms
from ..core.errors import CapabilityError, InputError
from ..core.mechanisms import Mechanism
from ..core.mechanisms.base import State
from .config import MacformerConfig
from .decoder_layer import TransformerDecoderLayer
from .dropout import Dropout
from .encoder_layer import TransformerEncoderLayer
from .positions import LearnedPositions, Rotary, SinusoidalPositions, check_rotary, positions_of


class StackState(NamedTuple):
    """What a causal stack keeps between calls: per layer the mechanism's state, and how many tokens were attended.

    All tensors have the batch first, so ``select`` works on rows.
    """

    layers: tuple[State, ...]
    lengths: Tensor  # (B,)

    def select(self, rows: Tensor) -> StackState:
        """The state of some rows of the batch, in this order, repeated ones too."""
        return StackState(tuple(tuple(part[rows] for part in layer) for layer in self.layers), self.lengths[rows])


class Stack(nn.Module):
    """Vectors (B, N, E) -> hidden states (B, N, E).

    Args:
        config: of the model.
        kind: "encoder" (bidirectional), "causal" (a language model's) or "decoder" (causal, with attention to a
            memory).

    Raises:
        CapabilityError: a mechanism that cannot be used in this place.
    """

    def __init__(self, config: MacformerConfig, kind: Literal["encoder", "causal", "decoder"]) -> None:
        super().__init__()
        self.kind = kind
        self.dropout = Dropout(config.dropout)
        length = config.max_length + int(kind == "encoder" and config.pooling == "cls")
        self.positions: LearnedPositions | SinusoidalPositions | None = None
        if config.position == "learned":
            self.positions = LearnedPositions(length, config.embed_dim)
        elif config.position == "sinusoidal":
            self.positions = SinusoidalPositions(config.embed_dim)
        self.rotary = Rotary(config.head_dim) if config.position == "rotary" else None
        self.layers = nn.ModuleList()
        own = config.layers("decoder" if kind == "decoder" else "self")
        cross = config.layers("cross") if kind == "decoder" else ((None, {}),) * len(own)
        first: list[Mechanism | None] = [None, None]
        for (name, options), (cross_name, cross_options) in zip(own, cross, strict=True):
            layer = _layer(
                config,
                name,
                _completed(name, options, length, first[0]),
                cross_name,
                _completed(cross_name, cross_options, length, first[1]),
            )
            first[0] = first[0] or layer.self_attn.mechanism
            if isinstance(layer, TransformerDecoderLayer):
                first[1] = first[1] or layer.multihead_attn.mechanism
            self.layers.append(layer)
            self._check(layer)
        self.norm = (
            nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, bias=config.bias) if config.norm_first else None
        )

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        state: StackState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, StackState | None]:
        """Hidden states of x, and the state after its last token if asked for.

        Args:
            x: (B, N, E).
            key_mask: (B, N) bool, True = attend.
            memory: (B, S, E), of a decoder.
            memory_mask: (B, S).
            state: what an earlier call returned; x holds the new tokens only.
            return_state: whether to return it.
        """
        positions = positions_of(key_mask, x.shape[1], x.device)
        if state is not None:
            if len(state.layers) != len(self.layers) or state.lengths.shape[0] != x.shape[0]:
                raise InputError(
                    f"state is of {len(state.layers)} layers and {state.lengths.shape[0]} sequences; wanted what this "
                    f"model returned, with {len(self.layers)} layers, for the {x.shape[0]} sequences given now"
                )
            positions = positions + state.lengths[:, None]
        if self.positions is not None:
            x = x + self.positions(positions, from_zero=state is None).to(x.dtype)
        x = self.dropout(x)
        rotation = None if self.rotary is None else self.rotary(positions, from_zero=state is None)
        states: list[State] = []
        for i, layer in enumerate(self.layers):
            arguments: dict[str, Any] = {
                "key_mask": key_mask,
                "rotation": rotation,
                "state": None if state is None else state.layers[i],
                "return_state": return_state,
            }
            if isinstance(layer, TransformerDecoderLayer):
                assert memory is not None
                x, new = layer.decode(x, memory, memory_mask=memory_mask, **arguments)
            else:
                assert isinstance(layer, TransformerEncoderLayer)
                x, new = layer.encode(x, is_causal=self.kind == "causal", **arguments)
            if new is not None:
                states.append(new)
        if self.norm is not None:
            x = self.norm(x)
        if not return_state:
            return x, None
        added = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.long) if key_mask is None else key_mask.sum(-1)
        return x, StackState(tuple(states), added if state is None else state.lengths + added)

    def _check(self, layer: TransformerEncoderLayer | TransformerDecoderLayer) -> None:
        mechanism = layer.self_attn.mechanism
        if self.kind == "encoder":
            if not mechanism.bidirectional:
                raise CapabilityError(
                    f"{mechanism.name} as configured ({mechanism.extra_repr()}) works along time, and an encoder's "
                    "tokens see both sides; take it for a language model or a decoder"
                )
        elif not mechanism.causal:
            known = ", ".join(name for name in mechanisms.names() if mechanisms.row(name).causal)
            raise CapabilityError(
                f"{mechanism.name} has no causal form, which a {_NOUN[self.kind]} needs; take one of {known}"
            )
        if self.rotary is not None:
            check_rotary(mechanism)
        if isinstance(layer, TransformerDecoderLayer):
            _check_cross(layer.multihead_attn.mechanism)


_NOUN = {"causal": "language model", "decoder": "decoder"}


def _check_cross(mechanism: Mechanism) -> None:
    """Refuse what cannot attend from one sequence to another; raises CapabilityError."""
    if not mechanism.bidirectional:
        raise CapabilityError(
            f"{mechanism.name} as configured ({mechanism.extra_repr()}) works along time, and a decoder looks at "
            "a whole "
            "memory; pass cross_mechanism= as well"
        )
    if mechanism.aligned:
        raise CapabilityError(
            f"{mechanism.name} has a window around each position, and positions of two sequences are not comparable; "
            "pass cross_mechanism= as well, 'macformer' for example"
        )
    if getattr(mechanism, "ppsbn", None) == "batch":
        raise CapabilityError(
            "ppsbn='batch' takes statistics over all tokens of the decoder, so that the past would see the "
            "future; pass "
            "ppsbn='token' for cross_mechanism"
        )


def _layer(
    config: MacformerConfig, name: str, options: dict[str, Any], cross_name: str | None, cross_options: dict[str, Any]
) -> TransformerEncoderLayer | TransformerDecoderLayer:
    def dropped(which: str | None) -> dict[str, Any]:
        return {"dropout_p": config.attention_dropout} if which == "softmax" and config.attention_dropout else {}

    arguments: dict[str, Any] = {
        "dropout": config.dropout,
        "activation": config.activation,
        "layer_norm_eps": config.layer_norm_eps,
        "batch_first": True,
        "norm_first": config.norm_first,
        "bias": config.bias,
        "num_kv_heads": config.num_kv_heads,
        "mechanism": name,
        "attention_dropout": 0.0,
        **dropped(name),
        **options,
    }
    sizes = (config.embed_dim, config.num_heads, config.ff_dim)
    if cross_name is None:
        layer = TransformerEncoderLayer(*sizes, **arguments)
    else:
        arguments |= {"cross_mechanism": cross_name, "cross_options": {**dropped(cross_name), **cross_options}}
        layer = TransformerDecoderLayer(*sizes, **arguments)
    for name, part in layer.named_children():
        if isinstance(part, nn.Dropout):
            setattr(layer, name, Dropout(part.p))
    return layer


def _completed(name: str | None, options: dict[str, Any], length: int, first: Mechanism | None) -> dict[str, Any]:
    """Options with what only the model knows: how long a learned Linformer must be, and the E its layers share."""
    if name != "linformer" or options.get("projection", "learned") != "learned":
        return options
    shared = getattr(first, "E", None) if options.get("sharing") == "layerwise" else None
    return {"seq_len": length, **options, **({} if shared is None else {"shared": shared})}
