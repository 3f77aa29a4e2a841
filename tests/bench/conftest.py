"""A result of ``maclin bench`` with figures that are made up, and a job that takes no time."""

from __future__ import annotations

import functools

import pytest

from maclin.bench import BenchJob, run
from maclin.bench.floor import floor, measure_rates
from maclin.records import SCHEMA_VERSION, BenchResult, BenchRow, Environment, Rates, Timing

MACHINE = Environment("2026-01-31", "0", "3.11", "2.13", None, "linux", "A <b>processor</b>", "cpu", 2, "float32")
RATES = Rates(1e10, 1e11, 2**23, "1 x (1024, 1024) @ (1024, 1024)", "float32")


def row(subject: str, length: int, ms: float | None, kind: str = "mechanism", spread: float = 0.1) -> BenchRow:
    """A row whose floor is 0.1 ms for 1,000 tokens: 10,000 operations of each at 1e11 a second."""
    if ms is None:
        return BenchRow(Timing(subject, "attention", length, None, reason="it is <wrong>."), kind)
    low, high = ms * (1 - spread), ms * (1 + spread)
    timing = Timing(subject, "attention", length, ms, low, high, 7, peak_bytes=4 * length)
    limit = None if kind == "peer" else floor(length, 10_000 * length, RATES)
    return BenchRow(timing, kind, limit, 3 * length, 4 * length)


@pytest.fixture
def result() -> BenchResult:
    rows = []
    for length, softmax in ((1000, 1.0), (2000, 4.0), (4000, 16.0)):
        rows.append(row("softmax", length, softmax, "baseline"))
        rows.append(row("efficient", length, 2.0 * length / 2000))
        rows.append(row("a peer (pip)", length, 8.0 * length / 2000, "peer"))
        rows.append(row("wrong", length, None))
    settings = {"mechanisms": ["efficient", "wrong"], "lengths": [1000, 2000, 4000], "backward": False, "causal": False}
    return BenchResult(SCHEMA_VERSION, "speed", MACHINE, settings, RATES, tuple(rows), warnings=("a <warning>",))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> BenchJob:
    small = functools.partial(measure_rates, copied_bytes=(2**16,), shapes=((1, 64, 64, 64),), seconds=0.01)
    monkeypatch.setattr(run, "measure_rates", lambda dtype, device: small(dtype, device))
    return BenchJob(
        "speed",
        "efficient,mean",
        (16, 32, 64),
        num_heads=2,
        head_dim=8,
        device="cpu",
        seconds_per_point=0.001,
        max_seconds_per_run=60.0,
    )
