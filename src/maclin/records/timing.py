"""Latency and memory, and from which length on something pays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Latency and memory of one thing at one length. None where not measured; ``reason`` says why."""

    subject: str  # a mechanism's name, or "original" and "converted" for whole models
    scope: str  # "attention" or "model"
    length: int
    latency_ms: float | None  # median
    latency_ms_low: float | None = None  # quartiles
    latency_ms_high: float | None = None
    num_runs: int = 0
    peak_bytes: int | None = None  # beyond the inputs, output included
    reason: str | None = None
    num_linear: int | None = None  # scope "model", subject "converted": how many layers were linear


@dataclass(frozen=True)
class BreakEven:
    """From which length on a mechanism is faster than fused softmax."""

    subject: str
    scope: str
    length: int | None  # smallest measured length from which on it is always faster; None: never, as measured
    note: str
