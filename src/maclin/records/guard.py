"""What a guard saw while a converted model served, and how often it was right where the truth was computed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GuardHistogram:
    """How often a value was at most each bound; ``counts`` has one entry more, for what is above the last bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # of each interval, not summed up
    total: float  # of the values

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclass(frozen=True)
class GuardEstimate:
    """Relative error of one sequence in one layer, from sampled rows, with its interval."""

    rel_error: float
    low: float
    high: float
    num_rows: int  # query rows over all heads


@dataclass(frozen=True)
class GuardDrift:
    """One statistic of a layer's input now, beside the calibration.

    ``shift`` is the difference of the means in standard deviations of single sequences of the calibration; None as
    long as one of both was not seen.
    """

    statistic: str  # "q_norm", "k_norm", "entropy_ratio"
    calibration_mean: float | None
    calibration_std: float | None
    recent_mean: float | None
    shift: float | None


@dataclass(frozen=True)
class GuardLayer:
    """Counters of one converted layer.

    ``sequences`` counts each sequence of each call; ``checked`` those whose error was estimated. ``not_checked`` holds
    the others by reason. ``answered_exactly`` are sequences whose output was made by exact attention in the end.
    """

    layer: str
    mechanism: str
    tolerance: float
    calls: int
    sequences: int
    checked: int
    not_checked: dict[str, int]
    flagged: dict[str, int]  # by reason: error, bound, nonfinite, denominator
    answered_exactly: int
    nonfinite_inputs: int  # flagged sequences for which exact attention is not finite either
    held_exact: bool  # whether the layer stays exact until it is released
    attached: bool  # whether the guarded mechanism still stands in the model: not after another conversion
    rows: int  # query rows computed exactly, over all heads
    bad_denominators: int  # negative, or too small to divide by
    counted_denominators: int  # among which those were found
    rel_error: GuardHistogram
    last: GuardEstimate | None
    drift: tuple[GuardDrift, ...] = ()

    @property
    def flagged_total(self) -> int:
        """Flagged sequences, whatever the reason."""
        return sum(self.flagged.values())


@dataclass(frozen=True)
class GuardRecord:
    """All counters of one guard; ``share`` is its own time over that of the model's forward without it."""

    layers: tuple[GuardLayer, ...]
    action: str
    confidence: float
    sample_rows: int
    forwards: int
    forward_s: float  # of the model alone: without the guard and without exact attention that it asked for
    guard_s: float
    exact_s: float
    share: float | None  # None as long as no forward was timed


@dataclass(frozen=True)
class GuardRate:
    """Decisions of the guard on layers whose true error was computed in full, for one tolerance."""

    tolerance: float
    above: int  # decisions on layers whose true error is above twice the tolerance
    above_flagged: int
    below: int  # decisions on layers whose true error is below half the tolerance
    below_flagged: int

    @property
    def detected_share(self) -> float | None:
        """Flagged share of those above twice the tolerance; None where there are none."""
        return self.above_flagged / self.above if self.above else None

    @property
    def false_share(self) -> float | None:
        """Flagged share of those below half the tolerance; None where there are none."""
        return self.below_flagged / self.below if self.below else None


@dataclass(frozen=True)
class GuardRates:
    """What a guard costs, and how often its decisions are right, on one model and its batches.

    ``covered_share`` is how often the interval of the estimate holds the true error, of one that should do so with
    ``confidence`` on either side.
    """

    rates: tuple[GuardRate, ...]
    confidence: float
    sample_rows: int
    num_tokens: int  # of the longest batch
    num_layers: int
    num_estimates: int
    covered_low_share: float
    covered_high_share: float
    worst_ratio: float  # of estimate and truth, the larger over the smaller
    forward_ms: float  # median, without the guard
    guard_ms: float  # median per forward, measured inside
    share: float  # median of guard over the rest of the forward it was part of
    true_errors: tuple[float, ...] = field(default=())  # one per layer and batch
