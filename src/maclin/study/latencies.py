"""Latency and memory of several mechanisms at one length, as one cell of a study's journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..bench import oracle_check, sweep
from ..bench.sweep import predicted
from ..core.mechanisms import Mechanism, row
from ..records import Config, Timing

EXACT = "exact softmax"
"""What fused softmax is called in tables and charts; a mapping of mechanisms needs no entry for it."""


def latencies(
    mechanisms: Mapping[str, Mechanism],
    length: int,
    before: Sequence[Config],
    *,
    seconds_per_point: float,
    max_seconds_per_run: float,
    say: Callable[[str], None],
) -> Config:
    """Measure mechanisms in turns, beside torch's fused softmax, on normal q, k and v of their own sizes.

    What would take too long is left out, going by the lengths before; ``bench.sweep`` guards memory and checks that
    each mechanism computes what its formula says.

    Args:
        mechanisms: by the name to show; all of one number of heads and head width.
        length: tokens.
        before: what was returned for shorter lengths, with ``length``.
        seconds_per_point: wall time for the runs of one mechanism.
        max_seconds_per_run: longest single run that is still started.
        say: is told, in words, what is being done.

    Returns:
        ``latencies``: rows of subject, latency_ms with quartiles (None with a reason where not measured), num_runs,
        peak_bytes.
    """
    first = next(iter(mechanisms.values()))
    built = {EXACT: row("softmax").cls(first.head_dim, first.num_heads), **mechanisms}
    reasons: dict[str, str] = {}
    for name, mech in built.items():
        known = {cell["length"]: ms / 1e3 for cell in before if (ms := latency(cell, name)) is not None}
        seconds = predicted(known, length, unknown=1.0 if row(mech.name).linear else 2.0)
        if seconds > max_seconds_per_run:
            reasons[name] = f"predicted {seconds:.3g} s for a run exceeds the limit of {max_seconds_per_run:.3g} s"
    found: dict[str, Timing] = {}
    wanted = {name: mech.eval() for name, mech in built.items() if name not in reasons}
    if wanted:
        rows = sweep(
            wanted,
            [length],
            lambda length: tuple(_normal(first, length)),
            scope="attention",
            input_bytes=lambda length: 4 * 4 * first.num_heads * length * first.head_dim,  # q, k, v and out
            seconds_per_point=seconds_per_point,
            check=oracle_check,
            progress=say,
        )
        found = {timing.subject: timing for timing in rows}
    return {
        "latencies": [
            {"subject": name, "latency_ms": None, "reason": reasons[name]}
            if name in reasons
            else {
                "subject": name,
                "latency_ms": found[name].latency_ms,
                "latency_ms_low": found[name].latency_ms_low,
                "latency_ms_high": found[name].latency_ms_high,
                "num_runs": found[name].num_runs,
                "peak_bytes": found[name].peak_bytes,
                "reason": found[name].reason,
            }
            for name in built
        ]
    }


def _normal(mech: Mechanism, length: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(length)
    for _ in range(3):
        yield torch.randn(1, mech.num_heads, length, mech.head_dim, generator=generator)


def latency(cell: Config, subject: str, field: str = "latency_ms") -> float | None:
    """A figure of one subject in a cell of latencies; None where it was not measured."""
    return next((item.get(field) for item in cell["latencies"] if item["subject"] == subject), None)
