"""What the rest of ``adopt`` may know of a host library: attention layers, their calls, and a way to swap them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

MECHANISM = "maclin_mechanism"
"""Name under which a converted attention module holds its mechanism, as an ordinary submodule."""

GUARD = "_maclin_guard"
"""Name under which a guarded model holds its guard, as an ordinary attribute."""

Batch = Mapping[str, Any] | Tensor
"""Keyword arguments of the model's forward, or its one main input."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model, as a forward pass on example inputs showed it.

    Attributes:
        name: qualified module name, relative to the host's root.
        module: the module itself.
        num_heads: heads of q.
        num_kv_heads: heads of k and v, before any repetition.
        head_dim: width of q and k per head.
        value_dim: width of v per head.
        is_causal: whether a token sees only itself and what is before it.
        is_cross: whether keys and values come from another sequence than the queries.
        calls: how often one forward pass calls the module; above 1 where layers share their weights.
        refused: why it cannot be replaced faithfully; None where it can.
    """

    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    is_causal: bool
    calls: int = 1
    refused: str | None = None
    is_cross: bool = False

    @property
    def unmeasured(self) -> str | None:
        """Why errors are not measured on this layer: what speaks against replacing it, or against measuring it."""
        if self.refused is None and self.is_cross:
            return "it is cross-attention, on which errors are not measured; convert it by name with a mapping"
        return self.refused


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer was given in one forward pass.

    Shape:
        q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S) bool with True = attend, or None
        where every key may be attended to. ``scale`` is None where the host uses 1/sqrt(D), so that every
        mechanism applies the scale of its own formula. ``is_cross``: keys come from another sequence.
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    is_causal: bool
    scale: float | None
    is_cross: bool = False


class Host(Protocol):
    """A model seen through its host library."""

    name: str

    @property
    def root(self) -> nn.Module:
        """The model that layer names are relative to."""
        ...

    def layers(self, batch: Batch | None = None) -> tuple[AttentionLayer, ...]:
        """The attention layers, found by one forward pass on ``batch`` or on example inputs of the host's making."""
        ...

    @property
    def has_example(self) -> bool:
        """Whether ``layers`` can make up example inputs for this kind of model."""
        ...

    def observe(self, batch: Batch, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        """Run the model with exact attention and show ``callback`` every call of the modules in ``names``."""
        ...

    @property
    def converted(self) -> bool:
        """Whether ``install`` was called and ``remove`` was not."""
        ...

    def install(self, mechanisms: Mapping[nn.Module, nn.Module]) -> None:
        """Give each attention module its mechanism; replaces an earlier installation. All or nothing."""
        ...

    def remove(self) -> None:
        """Give the model back its own attention."""
        ...
