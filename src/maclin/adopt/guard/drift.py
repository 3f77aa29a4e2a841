"""Whether what comes in still looks like the calibration: means of a few statistics, in its standard deviations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from maclin.adopt.guard.examine import STATISTICS
from maclin.records import GuardDrift

MEMORY = 32
"""Sequences that what is recent goes back to: the weight of one fades by 1 / MEMORY with each that follows."""

_LEAST_STD = 0.01
"""Of the mean: documents that agree by chance must not make every other one look strange."""


@dataclass
class Moments:
    """Mean and standard deviation of numbers that come one by one.

    Attributes:
        count: how many there were.
        mean: of them.
        squares: sum of squared differences from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """One number more."""
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self.squares += before * (value - self.mean)

    @property
    def std(self) -> float:
        """Standard deviation; 0 for fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


@dataclass
class Statistic:
    """One statistic of one layer: the calibration, what came since, and what is recent.

    Attributes:
        calibration: what it was.
        since: all that came after the calibration, which ``adapt`` takes over.
        recent: a mean that forgets.
    """

    calibration: Moments = field(default_factory=Moments)
    since: Moments = field(default_factory=Moments)
    recent: float = 0.0

    def add(self, value: float) -> None:
        """A sequence that was served."""
        self.since.add(value)
        self.recent += (value - self.recent) / min(self.since.count, MEMORY)

    @property
    def shift(self) -> float | None:
        """Recent mean less that of the calibration, in its standard deviations."""
        if not self.calibration.count or not self.since.count:
            return None
        least = _LEAST_STD * abs(self.calibration.mean)
        std = max(self.calibration.std, least)
        difference = self.recent - self.calibration.mean
        return difference / std if std > 0 else math.copysign(math.inf, difference) if difference else 0.0


class Drift:
    """The statistics of one layer.

    Args:
        baseline: sequences that become the calibration where none was given.
    """

    def __init__(self, baseline: int) -> None:
        self.baseline = baseline
        self.statistics = {name: Statistic() for name in STATISTICS}
        self.calibrated = False

    def add(self, values: Mapping[str, float]) -> None:
        """A sequence that was served; it goes to the calibration as long as that has too few."""
        for name, value in _finite(values):
            statistic = self.statistics[name]
            statistic.add(value) if self.calibrated else statistic.calibration.add(value)
        if all(statistic.calibration.count >= self.baseline for statistic in self.statistics.values()):
            self.calibrated = True

    def learn(self, values: Mapping[str, float]) -> None:
        """A sequence of the calibration, which is then as large as it was made."""
        for name, value in _finite(values):
            self.statistics[name].calibration.add(value)
        self.calibrated = True

    def adapt(self) -> None:
        """Make what came since the calibration the calibration; with less than two sequences, start it anew."""
        enough = all(statistic.since.count > 1 for statistic in self.statistics.values())
        self.statistics = {
            name: Statistic(calibration=statistic.since if enough else Moments())
            for name, statistic in self.statistics.items()
        }
        self.calibrated = enough

    def record(self) -> tuple[GuardDrift, ...]:
        """The statistics as they stand."""
        found: list[GuardDrift] = []
        for name, one in self.statistics.items():
            known, came = one.calibration.count > 0, one.since.count > 0
            found.append(
                GuardDrift(
                    name,
                    one.calibration.mean if known else None,
                    one.calibration.std if known else None,
                    one.recent if came else None,
                    one.shift,
                )
            )
        return tuple(found)


def _finite(values: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in values.items() if math.isfinite(value)]
