"""Latencies of several things, measured in turns so that they share whatever the machine does meanwhile."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TimingStats:
    """Median and quartiles of the latencies of ``runs`` runs, in milliseconds."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int


def interleaved(
    subjects: Mapping[str, Callable[[], object]],
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    min_runs: int = 5,
    max_runs: int = 100,
    max_seconds: float = 10.0,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] | None = None,
) -> dict[str, TimingStats]:
    """Time the subjects round by round, each once a round, without gradients.

    Rounds go on until ``max_runs``, or until another round would go beyond ``max_seconds`` and ``min_runs``
    are done. Each round begins with another subject, so that none always runs on the caches that one other
    leaves behind. On CUDA the device is synchronised before and after each run. The garbage collector
    waits meanwhile.

    Args:
        subjects: what to time, by name; each is called without arguments.
        before: what to call before each run of a subject, not timed; brings one object into different states.
        min_runs: runs of each subject at least, whatever the time.
        max_runs: runs of each subject at most.
        max_seconds: wall time of all runs together, the warm-up left out.
        warm_up: runs of each subject that are not counted, before the first round.
        device: where the subjects compute.
        clock: seconds, monotonic.
        progress: is told, in words, what has been done.

    Returns:
        Statistics by name, in the order of ``subjects``.

    Raises:
        ValueError: ``min_runs`` or ``warm_up`` is too small, or ``max_runs`` below ``min_runs``.
    """
    if min_runs < 1 or max_runs < min_runs or warm_up < 0:
        raise ValueError(
            f"wanted 1 <= min_runs <= max_runs and warm_up >= 0, got min_runs={min_runs}, max_runs={max_runs}, "
            f"warm_up={warm_up}"
        )
    names = list(subjects)
    prepare = before or {}
    latencies_ms: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect(1)  # what is young; a full collection would take longer than many a subject
    gc.disable()
    try:
        with torch.inference_mode():
            for name in names * warm_up:
                _seconds_of(subjects[name], prepare.get(name), device, clock)
            start = clock()
            last = start
            for round_number in range(max_runs if names else 0):
                shift = round_number % len(names)
                for name in names[shift:] + names[:shift]:
                    latencies_ms[name].append(1e3 * _seconds_of(subjects[name], prepare.get(name), device, clock))
                now = clock()
                if round_number + 1 >= min_runs and now + (now - last) - start > max_seconds:
                    break
                last = now
    finally:
        if collecting:
            gc.enable()
    stats = {name: _stats(values) for name, values in latencies_ms.items()}
    if progress is not None:
        for name, row in stats.items():
            progress(f"{name}: {row.median_ms:.3f} ms ({row.q1_ms:.3f} to {row.q3_ms:.3f}) in {row.runs} runs")
    return stats


def _seconds_of(
    subject: Callable[[], object],
    before: Callable[[], object] | None,
    device: torch.device | str,
    clock: Callable[[], float],
) -> float:
    """Wall time of one call, in seconds, until its device has finished."""
    if before is not None:
        before()
    _synchronize(device)
    start = clock()
    result = subject()
    _synchronize(device)
    seconds = clock() - start
    del result  # freeing the result is not part of computing it
    return seconds


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _stats(values_ms: list[float]) -> TimingStats:
    if len(values_ms) == 1:
        return TimingStats(values_ms[0], values_ms[0], values_ms[0], 1)
    q1, median, q3 = statistics.quantiles(values_ms, n=4, method="inclusive")
    return TimingStats(median, q1, q3, len(values_ms))
