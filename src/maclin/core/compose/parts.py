"""The registry, for mechanisms that are made of others and are listed there themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..mechanisms.base import Mechanism

if TYPE_CHECKING:
    from ..mechanisms import Row


def row(name: str) -> Row:
    """As ``core.mechanisms.row``."""
    from .. import mechanisms  # it imports this package

    return mechanisms.row(name)


def mechanism(
    name: str, *, head_dim: int, num_heads: int, num_kv_heads: int | None = None, **options: Any
) -> Mechanism:
    """As ``core.mechanisms.mechanism``."""
    from .. import mechanisms

    return mechanisms.mechanism(name, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, **options)
