"""Latency and memory of several subjects over a range of lengths; what cannot be measured says why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from maclin.core.errors import CapabilityError
from maclin.records import Timing

from .memory import free_bytes, peak_bytes
from .timing import interleaved

_HEADROOM = 0.8  # share of the free memory that a sweep may fill
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


@dataclass
class _History:
    """What a subject took at the lengths before, in seconds and bytes."""

    seconds: dict[int, float] = field(default_factory=dict)
    bytes: dict[int, float] = field(default_factory=dict)


def sweep(
    subjects: Mapping[str, Callable[..., object]],
    lengths: Iterable[int],
    make_inputs: Callable[[int], Sequence[object]],
    *,
    scope: str,
    linear: Collection[str] = (),
    before: Mapping[str, Callable[[], object]] | None = None,
    device: torch.device | str = "cpu",
    input_bytes: Callable[[int], int] | None = None,
    seconds_per_point: float = 2.0,
    max_seconds_per_run: float | None = None,
    memory_limit_bytes: int | None = None,
    check: Callable[[Callable[..., object]], str | None] | None = None,
    timed: bool = True,
    progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Measure each subject at each length, all subjects of a length in turns on the same inputs.

    The first run at a length is watched for memory. Subjects that took no more than ``seconds_per_point``
    are then timed in turns, the others once. What would not fit into memory, or take too long, going by the
    growth at the lengths before, is not run; its record has no figure and a reason. So has a subject whose check
    fails: there is no speed for a wrong result.

    Args:
        subjects: what to measure, by name; each is called with the inputs.
        lengths: tokens; measured in ascending order.
        make_inputs: length -> the arguments of a subject.
        scope: of the records, "attention" or "model".
        linear: subjects known to take time with the length, not its square, where only one length is measured yet.
        before: what to call before each run of a subject, neither timed nor counted as memory.
        device: where the subjects compute.
        input_bytes: length -> bytes of the inputs, asked before they are made.
        seconds_per_point: wall time for the runs of one subject at one length.
        max_seconds_per_run: longest single run that is still started; 10 times ``seconds_per_point`` by default.
        memory_limit_bytes: for inputs and computation together; 80 % of what is free by default.
        check: subject -> None, or in one sentence what is wrong with its results; asked once, first.
        timed: whether to measure latency, too; without it the records hold the memory of one run.
        progress: is told, in words, what is being done.
        clock: seconds, monotonic.

    Returns:
        One record for each length and subject, ordered by length.

    Raises:
        ValueError: there is no subject, or a length below 1.
    """
    lengths = sorted(set(lengths))
    if not subjects or not lengths or lengths[0] < 1:
        raise ValueError(f"wanted subjects and lengths of at least 1, got {list(subjects)} and {lengths}")
    if max_seconds_per_run is None:
        max_seconds_per_run = 10 * seconds_per_point
    say = progress or (lambda _: None)
    refused: dict[str, str] = {}
    if check is not None:
        for name, subject in subjects.items():
            wrong = check(subject)
            if wrong is not None:
                refused[name] = wrong
    runner = _Runner(scope, before or {}, device, seconds_per_point, timed, clock, say)
    history = {name: _History() for name in subjects}
    timings: list[Timing] = []
    for length in lengths:
        limit = memory_limit_bytes
        if limit is None:
            free = free_bytes(device)
            limit = None if free is None else int(_HEADROOM * free)
        given = input_bytes(length) if input_bytes is not None else 0
        reasons = dict(refused)
        for name in subjects:
            growth = 1.0 if name in linear else 2.0
            reason = _too_much(history[name], growth, length, given, limit, max_seconds_per_run)
            if reason is not None:
                reasons.setdefault(name, reason)
        rows = {name: Timing(name, scope, length, None, reason=reason) for name, reason in reasons.items()}
        rows |= runner.measure({name: subjects[name] for name in subjects if name not in rows}, length, make_inputs)
        for name in subjects:
            row = rows[name]
            timings.append(row)
            if row.reason is not None:
                say(f"{name} at {length}: {row.reason}")
                continue
            history[name].seconds[length] = runner.first_s[name] if row.latency_ms is None else row.latency_ms / 1e3
            history[name].bytes[length] = row.peak_bytes or 0
    return timings


@dataclass(frozen=True)
class _Runner:
    """Measures what is known to fit; the arguments are those of ``sweep``."""

    scope: str
    before: Mapping[str, Callable[[], object]]
    device: torch.device | str
    seconds_per_point: float
    timed: bool
    clock: Callable[[], float]
    say: Callable[[str], None]
    first_s: dict[str, float] = field(default_factory=dict)  # of the latest first run

    def measure(
        self,
        subjects: Mapping[str, Callable[..., object]],
        length: int,
        make_inputs: Callable[[int], Sequence[object]],
    ) -> dict[str, Timing]:
        """A record of each subject at one length."""
        if not subjects:
            return {}
        try:
            inputs = make_inputs(length)
        except RuntimeError as error:
            return self._failed(subjects, length, error)
        calls = {name: _bind(subject, inputs) for name, subject in subjects.items()}
        rows: dict[str, Timing] = {}
        peaks: dict[str, int] = {}
        slow: list[str] = []
        for name, call in calls.items():
            self.say(f"{name} at {length}: first run")
            try:
                if name in self.before:
                    self.before[name]()
                start = self.clock()
                peaks[name] = peak_bytes(call, self.device)
            except (CapabilityError, RuntimeError) as error:
                rows |= self._failed([name], length, error)
                continue
            self.first_s[name] = self.clock() - start
            if not self.timed:
                rows[name] = Timing(name, self.scope, length, None, peak_bytes=peaks.pop(name))
            elif self.first_s[name] > self.seconds_per_point:
                slow.append(name)
        # A first run can be slow for reasons of its own: what turns out fast the next time joins the others.
        for name in slow:
            rows |= self._timed({name: calls[name]}, length, peaks, max_runs=1)
        fast = {name: calls[name] for name in peaks if name not in slow or self._is_fast(rows[name])}
        return rows | self._timed(fast, length, peaks, max_runs=100)

    def _is_fast(self, row: Timing) -> bool:
        return row.latency_ms is not None and row.latency_ms <= 1e3 * self.seconds_per_point

    def _timed(
        self, calls: Mapping[str, Callable[[], object]], length: int, peaks: Mapping[str, int], max_runs: int
    ) -> dict[str, Timing]:
        try:
            stats = interleaved(
                calls,
                before=self.before,
                min_runs=min(3, max_runs),
                max_runs=max_runs,
                max_seconds=self.seconds_per_point * len(calls),
                warm_up=0,  # the first run was it
                device=self.device,
                clock=self.clock,
                progress=lambda text: self.say(f"at {length}: {text}"),
            )
        except RuntimeError as error:
            return self._failed(calls, length, error)
        return {
            name: Timing(
                subject=name,
                scope=self.scope,
                length=length,
                latency_ms=row.median_ms,
                latency_ms_low=row.q1_ms,
                latency_ms_high=row.q3_ms,
                num_runs=row.runs,
                peak_bytes=peaks[name],
            )
            for name, row in stats.items()
        }

    def _failed(self, names: Iterable[str], length: int, error: Exception) -> dict[str, Timing]:
        """Records that say why there is no figure; an error that is no such reason goes on."""
        if isinstance(error, CapabilityError):
            reason = str(error)
        elif isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY):
            reason = f"ran out of memory at {length} tokens"
        else:
            raise error
        return {name: Timing(name, self.scope, length, None, reason=reason) for name in names}


def _bind(subject: Callable[..., object], inputs: Sequence[object]) -> Callable[[], object]:
    return lambda: subject(*inputs)


def _too_much(
    history: _History, growth: float, length: int, input_bytes: int, limit_bytes: int | None, max_seconds: float
) -> str | None:
    """Why a run at this length is not started, or None."""
    if limit_bytes is not None and input_bytes > limit_bytes:
        return f"inputs and output alone are {_gib(input_bytes)} at {length} tokens; allowed are {_gib(limit_bytes)}"
    needed = input_bytes + predicted(history.bytes, length, unknown=1.0)
    if limit_bytes is not None and needed > limit_bytes:
        return f"would need about {_gib(needed)} at {length} tokens, more than the {_gib(limit_bytes)} allowed"
    seconds = predicted(history.seconds, length, unknown=growth)
    if seconds > max_seconds:
        return f"predicted {seconds:.3g} s for a run at {length} tokens exceeds the limit of {max_seconds:.3g} s"
    return None


def predicted(values: Mapping[int, float], length: int, unknown: float = 2.0) -> float:
    """What a cost will be at a length beyond those measured, going by the last two of them.

    The exponent of growth is kept between 1 and 2; where only one length is known it is ``unknown``.

    Args:
        values: the cost by length, ascending.
        length: where to predict.
        unknown: exponent to assume where nothing says more.

    Returns:
        The cost, in the unit of ``values``; 0 where nothing is known.
    """
    if not values:
        return 0.0
    *before, (last, value) = values.items()
    exponent = unknown
    if before and before[-1][1] > 0 and value > 0:
        exponent = math.log(value / before[-1][1]) / math.log(last / before[-1][0])
    return value * (length / last) ** min(max(exponent, 1.0), 2.0)


def _gib(value: float) -> str:
    return f"{value / 2**30:.3g} GiB"
