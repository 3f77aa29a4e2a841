"""What is counted of one layer; whoever changes it holds the guard's lock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from maclin.adopt.guard.drift import Drift
from maclin.adopt.guard.estimate import Estimate
from maclin.adopt.guard.examine import Seen
from maclin.records import GuardEstimate, GuardHistogram, GuardLayer

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0)
"""Of the histogram of estimated relative errors; 1 is an output of zeros."""

REASONS = ("error", "bound", "nonfinite", "denominator")
"""Why a sequence is flagged: its estimated error, a length that no average has, NaN or infinity, denominators."""

SKIPPED = ("budget", "turn", "decoding", "state", "packed", "train", "empty", "held")
"""Why a sequence was not checked; see docs/guard.md."""


class Histogram:
    """Counts of values by interval."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One value; infinity is above the last bound, and not summed up."""
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.total += value if value < float("inf") else 0.0

    def record(self) -> GuardHistogram:
        """As it stands."""
        return GuardHistogram(BOUNDS, tuple(self.counts), self.total)


class LayerCounters:
    """Counters of one layer.

    Args:
        baseline: sequences that become the calibration of the drift where none is given.
    """

    def __init__(self, baseline: int) -> None:
        self.drift = Drift(baseline)
        self.clear()

    def clear(self) -> None:
        """Back to zero; the calibration stays."""
        self.calls = 0
        self.sequences = 0
        self.checked = 0
        self.not_checked: Counter[str] = Counter()
        self.flagged: Counter[str] = Counter()
        self.exact = 0
        self.nonfinite_inputs = 0
        self.rows = 0
        self.bad_denominators = 0
        self.counted_denominators = 0
        self.histogram = Histogram()
        self.last: Estimate | None = None

    def skip(self, sequences: int, reason: str) -> None:
        """One call of which nothing was looked at."""
        self.calls += 1
        self.sequences += sequences
        self.not_checked[reason] += sequences

    def add(self, seen: list[Seen], skipped: str | None) -> None:
        """What was found in one call; ``skipped`` says why no row was computed, where none was."""
        self.calls += 1
        self.sequences += len(seen)
        for one in seen:
            if one.reason is not None:
                self.flagged[one.reason] += 1
            if one.estimate is None:
                self.not_checked[skipped or "empty"] += 1
                continue
            self.checked += 1
            self.rows += one.estimate.num_rows
            self.drift.add(one.statistics)
            if one.estimate.finite:
                self.last = one.estimate
                self.histogram.add(one.estimate.rel_error)

    def record(self, layer: str, mechanism: str, tolerance: float, held: bool, attached: bool) -> GuardLayer:
        """As they stand."""
        last = self.last
        return GuardLayer(
            layer=layer,
            mechanism=mechanism,
            tolerance=tolerance,
            calls=self.calls,
            sequences=self.sequences,
            checked=self.checked,
            not_checked={reason: self.not_checked[reason] for reason in SKIPPED},
            flagged={reason: self.flagged[reason] for reason in REASONS},
            answered_exactly=self.exact,
            nonfinite_inputs=self.nonfinite_inputs,
            held_exact=held,
            attached=attached,
            rows=self.rows,
            bad_denominators=self.bad_denominators,
            counted_denominators=self.counted_denominators,
            rel_error=self.histogram.record(),
            last=None if last is None else GuardEstimate(last.rel_error, last.low, last.high, last.num_rows),
            drift=self.drift.record(),
        )
