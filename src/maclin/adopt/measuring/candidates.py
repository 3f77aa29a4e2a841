"""What an audit tries on a layer: a mechanism in a configuration, what it has learned, and its error so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.calibrate import learned, short_config
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer
from maclin.core import mechanisms as registry
from maclin.core.errors import InputError, MaclinError
from maclin.core.statistics import guarded
from maclin.records import Config, MechanismError

DRAWS = 3
"""Independent draws of a random mechanism: batches take turns with them, and its error is that over all batches."""

_NOT_TRIED = ("softmax", "by_head")

Candidate = str | tuple[str, Config]
"""A mechanism's name, with its default configuration for the layer's width, or name and configuration."""


def default_config(name: str, head_dim: int) -> Config:
    """The configuration in which the audit tries a mechanism unless it is told another.

    The mechanism's own defaults, but for Linformer: learned projections say nothing before they are trained, so
    it is tried by mean pooling to twice the head's width.

    Args:
        name: one of ``maclin.core.mechanisms.names()``.
        head_dim: width of the layer's heads.
    """
    if name == "linformer":
        return {"projection": "mean-pool", "proj_len": 2 * head_dim}
    registry.row(name)
    return {}


def default_candidates(head_dim: int) -> list[tuple[str, Config]]:
    """What the audit tries unless it is told: every mechanism but softmax, macformer without ppSBN as well.

    Unit vectors keep macformer's logits within 1 / sqrt(D), so that it stays near averaging whatever was learned.
    Calibrated on raw q and k it follows softmax attention as far as its features reach: 4 D of them cost about as
    much as exact attention at 400 to 500 tokens, 8 D about twice that. by_head is made of what was tried by a plan.

    Args:
        head_dim: width of the layer's heads.
    """
    found: list[tuple[str, Config]] = []
    for name in registry.names():
        if name not in _NOT_TRIED:
            found.append((name, default_config(name, head_dim)))
        if name == "macformer":
            found.extend((name, {"ppsbn": False, "num_features": times * head_dim}) for times in (4, 8))
    return found


def plan_candidates(head_dim: int, tolerance: float | None = None) -> list[tuple[str, Config]]:
    """What is worth trying where a plan is to choose: ``default_candidates``, and more sizes of what plans are made of.

    Windows of a quarter and four times the default, hybrids with narrow windows, and with a tolerance macformer with as
    many features as it takes.

    Args:
        head_dim: width of the layer's heads.
        tolerance: of the plan.
    """
    found = default_candidates(head_dim)
    found.extend(("window", {"window": window}) for window in (16, 256))
    found.extend(("hybrid", {"window": window}) for window in (16, 32))
    if tolerance is not None:
        found.append(("macformer", {"ppsbn": False, "num_features": "auto", "tolerance": tolerance}))
    return found


def trials(names: Iterable[Candidate], layer: AttentionLayer) -> list[Trial]:
    """A trial of each candidate on a layer; where one cannot be built or applied, with the reason."""
    pairs = [(n, default_config(n, layer.head_dim)) if isinstance(n, str) else (n[0], dict(n[1])) for n in names]
    return [_trial(name, config, layer) for name, config in pairs]


def _trial(name: str, config: Config, layer: AttentionLayer) -> Trial:
    row = registry.row(name)
    if layer.is_causal and not row.causal:
        return Trial(name, config, reason=f"{name} has no causal form, and this layer is causal")
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    draws: list[registry.Mechanism] = []
    try:
        for seed in range(DRAWS if row.random else 1):
            extra: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if row.random else {}
            draws.append(registry.mechanism(name, **sizes, **config, **extra).eval())
            if _alike(draws[0], draws[-1]):
                del draws[1:]
    except MaclinError as error:
        return Trial(name, config, reason=str(error))
    return Trial(name, config, draws, draws[0].learns_from_data)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether nothing was drawn: two of the same options hold the same numbers."""
    theirs = other.state_dict()
    return all(x.shape == theirs[key].shape and torch.equal(x, theirs[key]) for key, x in one.state_dict().items())


@dataclass
class Trial:
    """One mechanism on one layer: what it has learned, and its squared error so far."""

    name: str
    config: Config
    draws: list[registry.Mechanism] = field(default_factory=list)
    learns: bool = False
    reason: str | None = None
    asked: Config | None = None
    reached: bool | None = None
    note: str = ""
    squared: Tensor | float = 0.0  # (H,)
    calls: int = 0
    rows: int = 0
    guarded: int = 0
    negative: int = 0

    def learn(self, sample: AttentionCall) -> bool:
        """Calibrate on a sample of the layer; whether that was done."""
        if not self.learns or self.reason is not None:
            return False
        try:
            self.draws = [learned(mechanism, sample) for mechanism in self.draws]
        except MaclinError as error:
            self.reason = str(error)
            return False
        self.asked, self.config = self.config, short_config(self.draws[0])
        calibration = getattr(self.draws[0], "calibration", None)
        self.reached, self.note = getattr(calibration, "reached", None), "; ".join(getattr(calibration, "note", ()))
        return True

    def leave_untaught(self) -> None:
        """Give the reason where there was nothing to learn from."""
        if self.learns and self.asked is None and self.reason is None:
            self.reason = (
                "it learns from data, and every third document is kept apart for that; pass at least 3 documents"
            )

    def add(self, call: AttentionCall, exact: Tensor, real: Tensor) -> None:
        """Compare one call with the exact output; tokens that are not ``real`` do not count."""
        if self.reason is not None:
            return
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
        options: dict[str, Any] = {"key_mask": call.key_mask, "is_causal": call.is_causal, "scale": call.scale}
        mechanism = self.draws[self.calls % len(self.draws)].to(device=q.device, dtype=dtype)
        try:
            with guarded() as counts:
                out = mechanism(q, k, v, **options)
        except MaclinError as error:
            self.reason = str(error)
            return
        self.calls += 1
        self.squared += squares(out - exact, real)
        self.rows += counts.rows
        self.guarded += counts.guarded
        self.negative += counts.negative

    def result(self, exact: Tensor) -> MechanismError:
        """The relative error; ``exact`` holds the squares of the exact output per head."""
        squared = torch.as_tensor(self.squared)
        if self.reason is None and not bool(torch.isfinite(squared).all()):
            self.reason = "its output is not finite on these documents"
        said: dict[str, Any] = {"asked": self.asked, "reached": self.reached, "note": self.note}
        if self.reason is not None:
            return MechanismError(self.name, self.config, None, reason=self.reason, **said)
        shares = (self.guarded / self.rows, self.negative / self.rows) if self.rows else (None, None)
        return MechanismError(self.name, self.config, *relative(squared, exact), *shares, **said)


def squares(x: Tensor, real: Tensor) -> Tensor:
    """Sum of squares per head (H,) of x (B, H, N, Dv) over real tokens, in float64 on the CPU."""
    return sums(x.double().square().sum(-1), real)


def sums(x: Tensor, real: Tensor) -> Tensor:
    """Sum per head (H,) of x (B, H, N) over real tokens, in float64 on the CPU."""
    return x.double().masked_fill(~real[:, None], 0.0).sum((0, 2)).cpu()


def relative(squared: Tensor, exact: Tensor) -> tuple[float, tuple[float, ...]]:
    """Relative error of all heads together, and of each, from squares per head (H,)."""
    by_head = tuple(
        math.sqrt(a / b) if b > 0 else math.sqrt(a) for a, b in zip(squared.tolist(), exact.tolist(), strict=True)
    )
    if not float(exact.sum()) > 0:
        raise InputError(
            "the attention output is zero everywhere on these documents; wanted a model with trained weights"
        )
    return math.sqrt(float(squared.sum() / exact.sum())), by_head
