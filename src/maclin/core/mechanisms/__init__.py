"""The registry: one literal row per mechanism. A new mechanism is its file, its row here, its row in the docs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..compose.by_head import ByHead
from ..compose.hybrid import Hybrid
from ..errors import OptionError
from .base import FeatureMechanism, Mechanism
from .efficient import Efficient
from .elu import Elu
from .favor import Favor
from .hedgehog import Hedgehog
from .linformer import Linformer
from .macformer import Macformer
from .mean import Mean
from .revisited_linformer import RevisitedLinformer
from .rfa import Rfa
from .softmax import Softmax
from .taylor import Taylor
from .window import Window

__all__ = ["FeatureMechanism", "Mechanism", "Row", "mechanism", "names", "row"]


@dataclass(frozen=True)
class Row:
    """What there is to know of a mechanism before it is built.

    Args:
        cls: the module.
        summary: one line.
        linear: cost grows linearly with the number of tokens.
        random: the constructor draws from ``generator``.
        baseline: there to compare with, not to convert to.
        exceptions: conformance checks that do not apply, with the reason; see ``maclin.testing``.
    """

    cls: type[Mechanism]
    summary: str
    linear: bool = True
    random: bool = False
    baseline: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        """The name in the registry."""
        return self.cls.name

    @property
    def causal(self) -> bool:
        """Whether is_causal and state are understood."""
        return self.cls.causal

    @property
    def takes_generator(self) -> bool:
        """Whether the constructor takes a ``generator``: for features, or for the start of what is learned."""
        return "generator" in inspect.signature(self.cls).parameters

    @property
    def options(self) -> dict[str, Any]:
        """Names of the options beyond the sizes, with their defaults."""
        parameters = inspect.signature(self.cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "generator"}

    def differing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a configuration's options that are not the defaults: with them a mechanism is built alike."""
        defaults = self.options
        return {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}


_ROWS: dict[str, Row] = {
    "softmax": Row(Softmax, "exact softmax attention, fused", linear=False, baseline=True),
    "mean": Row(Mean, "average of the values (uniform attention)", baseline=True),
    "window": Row(Window, "exact softmax within a local window"),
    "linformer": Row(
        Linformer,
        "keys and values projected to k slots: learned, or pooled",
        exceptions={"left_padding:learned": "E and F are indexed by position, so where the keys stand matters"},
    ),
    "efficient": Row(Efficient, "softmax over channels and over positions, apart"),
    "revisited_linformer": Row(
        RevisitedLinformer, "keys and values gathered in as many content slots as the head is wide"
    ),
    "rfa": Row(Rfa, "random Fourier features of unit vectors", random=True),
    "macformer": Row(Macformer, "random Maclaurin features of a dot-product kernel, with ppSBN", random=True),
    "taylor": Row(Taylor, "constant and linear term of a dot-product kernel, exactly"),
    "favor": Row(Favor, "positive orthogonal random features of softmax", random=True),
    "hedgehog": Row(Hedgehog, "learned positive features, begun as random features of softmax"),
    "hybrid": Row(Hybrid, "exact local window beside a linear mechanism, under one normaliser", random=True),
    "elu": Row(Elu, "elu + 1 features (linear Transformer)"),
    "by_head": Row(ByHead, "a mechanism of its own for each group of heads; exact where none is named", linear=False),
}


def names() -> list[str]:
    """The names of all mechanisms."""
    return list(_ROWS)


def row(name: str) -> Row:
    """The registry's row of a mechanism.

    Raises:
        OptionError: the name is unknown; the message lists the known ones.
    """
    if name == "auto":
        raise OptionError(
            "'auto' is no mechanism: what is best depends on the data; for tensors take maclin.choose(q, k, v), for a "
            "model maclin.convert_(model, 'auto', batches=...)"
        )
    if name not in _ROWS:
        raise OptionError(f"unknown mechanism {name!r}; known are {', '.join(_ROWS)}")
    return _ROWS[name]


def mechanism(
    name: str, *, head_dim: int, num_heads: int, num_kv_heads: int | None = None, **options: Any
) -> Mechanism:
    """Build a mechanism by name.

    Args:
        name: one of ``names()``.
        head_dim: D, width of each head of q and k.
        num_heads: H, heads of q.
        num_kv_heads: Hk, heads of k and v; divides H (default H).
        options: the mechanism's own, see its class; random ones take ``generator`` as well.

    Raises:
        OptionError: an unknown name or option (the message lists the known), or a value that cannot be.

    Example:
        >>> mech = maclin.mechanism("macformer", head_dim=64, num_heads=8, kernel="exp", num_features=128)
        >>> out = mech(q, k, v, key_mask=mask)
    """
    found = row(name)
    known = [*found.options, *(["generator"] if found.takes_generator else [])]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"{name} has no option {unknown[0]!r}; known are {', '.join(known) or 'none'}")
    return found.cls(head_dim, num_heads, num_kv_heads, **options)
