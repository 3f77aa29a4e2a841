"""Mechanisms as text: ``macformer:num_features=128:ppsbn=false,efficient``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from maclin.core import mechanisms as registry
from maclin.core.errors import OptionError
from maclin.core.mechanisms import Mechanism
from maclin.records import Config


@dataclass(frozen=True)
class Spec:
    """A mechanism's name and its options; ``text`` is what it is called in results."""

    text: str
    name: str
    options: Config = field(default_factory=dict)

    def build(self, head_dim: int, num_heads: int, num_kv_heads: int | None = None, seed: int = 0) -> Mechanism:
        """The mechanism in eval mode; what is drawn is drawn from ``seed``."""
        row = registry.row(self.name)
        drawn: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if row.takes_generator else {}
        sizes = {"head_dim": head_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        return registry.mechanism(self.name, **sizes, **self.options, **drawn).eval()


def default_spec(name: str) -> Spec:
    """A mechanism with its own defaults; Linformer with pooling, since a learned projection needs a length."""
    return parse_spec("linformer:projection=mean-pool" if name == "linformer" else name)


def parse_specs(text: str) -> tuple[Spec, ...]:
    """Read ``name:option=value:option=value,name``; values are JSON where they are JSON, else text.

    Commas within brackets belong to a value: ``macformer:counts=[1,64,45,18]``.

    Args:
        text: what somebody typed.

    Raises:
        OptionError: an unknown mechanism, a part that is no ``option=value``, a name twice, or nothing at all.
    """
    specs = tuple(parse_spec(part) for part in _split(text, ","))
    if not specs:
        raise OptionError(f"wanted mechanisms with commas, such as macformer:num_features=128,efficient, got {text!r}")
    texts = [spec.text for spec in specs]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise OptionError(f"the mechanism {twice!r} is named twice; wanted each once")
    return specs


def parse_spec(text: str) -> Spec:
    """One of those that ``parse_specs`` reads."""
    name, *pairs = _split(text, ":")
    registry.row(name)
    options: Config = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise OptionError(f"wanted name:option=value, such as macformer:num_features=128, got {pair!r} in {text!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return Spec(text, name, options)


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no brackets; empty ones left out."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
