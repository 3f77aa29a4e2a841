"""Latencies of mechanisms in the sizes of a layer, measured in turns on this machine; extrapolated where long."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maclin.core import mechanisms as registry
from maclin.core.errors import MaclinError
from maclin.records import Config, LayerAudit

SECONDS_PER_RUN = 0.25
"""A run that would take longer is measured at shorter lengths, and what it takes is extrapolated."""

_PROBE, _LEAST_RUNS, _MOST_RUNS, _SECONDS_PER_SUBJECT = 256, 7, 25, 0.1

GATHER = "(heads apart)"
"""Name of the subject that takes heads apart and together and does nothing else."""


class Cost(NamedTuple):
    """Of one call on one sequence: milliseconds or multiply-adds, and from how many tokens it was extrapolated."""

    value: float
    measured_length: int | None = None


class Subject(NamedTuple):
    """What is measured: a mechanism in the sizes of a layer."""

    name: str
    config: str  # JSON
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    is_causal: bool

    @classmethod
    def of(cls, layer: LayerAudit, name: str, config: Config, key_heads: int | None = None) -> Subject:
        """A mechanism on a layer, or on the heads of some of its key heads."""
        heads = layer.num_kv_heads if key_heads is None else key_heads
        return cls(
            name,
            json.dumps(config, sort_keys=True),
            heads * (layer.num_heads // layer.num_kv_heads),
            heads,
            layer.head_dim,
            layer.value_dim or layer.head_dim,
            layer.is_causal,
        )

    def __str__(self) -> str:
        """For the cache."""
        sizes = f"{self.num_heads}/{self.num_kv_heads} x {self.head_dim}/{self.value_dim}"
        return f"{self.name} {self.config} | {sizes} | {'causal' if self.is_causal else 'bidirectional'}"


class CostBench:
    """Measures subjects in turns, on one sequence of standard normal q, k and v.

    Args:
        device: where to measure.
        dtype: of q, k and v.
        length: tokens.
        progress: is told, in words, what has been done.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, length: int, progress: Callable[[str], None] | None
    ) -> None:
        self.device, self.dtype, self.length, self.progress = device, dtype, length, progress
        self.inputs: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def run(self, subjects: Sequence[Subject]) -> dict[Subject, Cost]:
        """The costs of those that can be run."""
        calls: dict[Subject, Callable[[int], object]] = {}
        with torch.inference_mode():
            for subject in subjects:
                try:
                    call = self._call(subject)
                    probe = self._seconds(call, min(self.length, _PROBE))
                except (MaclinError, RuntimeError):
                    continue  # what cannot be run has no cost, and no plan takes it
                calls[subject] = call
                self._say(f"{subject.name}: {1e3 * probe:.2f} ms at {min(self.length, _PROBE)} tokens")
            lengths = {subject: self._lengths(subject, call) for subject, call in calls.items()}
            points = [(subject, n) for subject, own in lengths.items() for n in own]
            medians = self._in_turns({point: calls[point[0]] for point in points})
        self.inputs.clear()
        return {s: self._cost(s, own, [medians[s, n] for n in own]) for s, own in lengths.items()}

    def _lengths(self, subject: Subject, call: Callable[[int], object]) -> list[int]:
        """The length itself, or the two largest halves of it whose runs are short enough."""
        power, n = (1 if _grows_linearly(subject) else 2), min(self.length, _PROBE)
        seconds = min(self._seconds(call, n) for _ in range(2))  # the first of a size may have more to do
        whole = self.length
        while whole > n and seconds * (whole / n) ** power > SECONDS_PER_RUN:
            whole //= 2
        return [self.length] if whole == self.length else [max(whole // 2, 1), max(whole, 2)]

    def _cost(self, subject: Subject, lengths: list[int], seconds: list[float]) -> Cost:
        if len(lengths) == 1:
            return Cost(1e3 * seconds[0])
        (n, m), (t, u) = lengths, seconds
        if _grows_linearly(subject):
            slope = max((u - t) / (m - n), 0.0)
            predicted = max(u + slope * (self.length - m), u)
        else:
            square = min(max((u / m - t / n) / (m - n), 0.0), u / m**2)
            predicted = square * self.length**2 + (u / m - square * m) * self.length
        return Cost(1e3 * predicted, m)

    def _in_turns(self, calls: Mapping[tuple[Subject, int], Callable[[int], object]]) -> dict[Any, float]:
        seconds: dict[Any, list[float]] = {point: [] for point in calls}
        collecting = gc.isenabled()
        gc.collect(1)
        gc.disable()
        try:
            start, points = time.perf_counter(), list(calls)
            for turn in range(_MOST_RUNS):
                shift = turn % max(len(points), 1)  # none always runs on the caches that one other leaves
                for point in points[shift:] + points[:shift]:
                    seconds[point].append(self._seconds(calls[point], point[1]))
                spent = time.perf_counter() - start
                if turn + 1 >= _LEAST_RUNS and spent > _SECONDS_PER_SUBJECT * len(points):
                    break
        finally:
            if collecting:
                gc.enable()
        return {point: statistics.median(found) for point, found in seconds.items()}

    def _seconds(self, call: Callable[[int], object], length: int) -> float:
        self._wait()
        start = time.perf_counter()
        call(length)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _call(self, subject: Subject) -> Callable[[int], object]:
        """What runs the subject on so many tokens, after a first run that makes what is kept between calls."""
        sizes = (subject.num_heads, subject.num_kv_heads, subject.head_dim, subject.value_dim)
        if subject.name == GATHER:
            return lambda length: _apart_and_together(*self._qkv(length, sizes))
        row, config = registry.row(subject.name), json.loads(subject.config)
        extra = {"generator": torch.Generator().manual_seed(0)} if row.takes_generator else {}
        mech = registry.mechanism(
            subject.name,
            head_dim=subject.head_dim,
            num_heads=subject.num_heads,
            num_kv_heads=subject.num_kv_heads,
            **{**config, **extra},
        ).to(device=self.device, dtype=self.dtype)
        mech.eval()

        def call(length: int) -> object:
            q, k, v = self._qkv(length, sizes)
            return mech(q, k, v, is_causal=subject.is_causal)

        call(min(self.length, _PROBE))
        return call

    def _qkv(self, length: int, sizes: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
        heads, key_heads, width, value_width = sizes
        key = (length, *sizes)
        if key not in self.inputs:
            generator = torch.Generator().manual_seed(0)
            shapes = ((heads, width), (key_heads, width), (key_heads, value_width))
            self.inputs[key] = tuple(
                torch.randn(1, h, length, d, generator=generator).to(device=self.device, dtype=self.dtype)
                for h, d in shapes
            )
        return self.inputs[key]

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)


def _apart_and_together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The copies of two groups of heads that do not follow each other."""
    halves = [[x[:, list(range(first, x.shape[1], 2))] for first in (0, 1)] for x in (k, v, q)]
    return torch.cat(halves[-1], 1)[:, list(range(q.shape[1]))]


def _grows_linearly(subject: Subject) -> bool:
    return subject.name == GATHER or registry.row(subject.name).linear
