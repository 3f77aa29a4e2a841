"""Runs of the arena, gathered by mechanism: means and spreads over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records import ArenaCost, ArenaRun, ArenaTaskResult

EXACT, AVERAGING = "softmax", "mean"
BASELINES = (EXACT, AVERAGING, "window")
LEARNS = 5.0
"""Points that softmax must be above averaging, for a task to count: below, attention is not what is learned."""


@dataclass(frozen=True)
class Mean:
    """Mean, sample standard deviation (None of a single value) and range of the values of several seeds."""

    value: float
    spread: float | None
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class Row:
    """One mechanism on one task.

    Args:
        label: of the mechanism.
        score: in the unit of the tables: percent of an accuracy, else as measured; None where it has none.
        distance: of its mean from that of softmax, positive where it is better; None without softmax.
        others: further figures of the test split, by name.
        seconds: of training.
        num_parameters: of the model.
        num_skipped_steps: of all seeds.
        reasons: why there is no score.
    """

    label: str
    score: Mean | None
    distance: float | None
    others: dict[str, Mean]
    seconds: Mean | None
    tokens_per_second: Mean | None
    num_parameters: int | None
    num_skipped_steps: int
    reasons: tuple[str, ...]

    @property
    def is_baseline(self) -> bool:
        """Whether it is there to compare with."""
        return self.label in BASELINES


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return Mean(statistics.fmean(known), spread, min(known), max(known), len(known))


def unit(metric: str) -> float:
    """Factor from a measured score to that of the tables."""
    return 100.0 if metric == "accuracy" else 1.0


def rows_of(result: ArenaTaskResult) -> tuple[Row, ...]:
    """One row for each mechanism, in the order of the runs."""
    groups = grouped(result.runs)
    exact = _score(groups.get(EXACT, []), result.task.metric)
    return tuple(_row(label, runs, result, exact) for label, runs in groups.items())


def counts(result: ArenaTaskResult) -> bool | None:
    """Whether softmax is far enough above averaging for the task to say something; None where that is not known."""
    found = {row.label: row.score for row in rows_of(result)}
    exact, averaging = found.get(EXACT), found.get(AVERAGING)
    if exact is None or averaging is None or result.task.metric != "accuracy":
        return None
    return exact.value - averaging.value >= LEARNS


def cost_of(result: ArenaTaskResult, label: str, length: int) -> ArenaCost | None:
    """The measured cost of a mechanism at a length."""
    return next((cost for cost in result.costs if (cost.label, cost.length) == (label, length)), None)


def ratio(value: float | None, to: float | None) -> float | None:
    """to / value: how many times less; None where either is missing."""
    return None if not value or to is None else to / value


def grouped(runs: Sequence[ArenaRun]) -> dict[str, list[ArenaRun]]:
    """The runs of each mechanism, by its label, in the order of the runs."""
    groups: dict[str, list[ArenaRun]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _score(runs: Sequence[ArenaRun], metric: str) -> Mean | None:
    return mean_of(None if run.score is None else unit(metric) * run.score for run in runs)


def _row(label: str, runs: list[ArenaRun], result: ArenaTaskResult, exact: Mean | None) -> Row:
    score = _score(runs, result.task.metric)
    sign = 1 if result.task.higher_is_better else -1
    names = [name for name in dict.fromkeys(n for run in runs for n in run.scores) if name != result.task.metric]
    others = {
        name: mean_of(None if (v := run.scores.get(name)) is None else unit(name) * v for run in runs) for name in names
    }
    return Row(
        label=label,
        score=score,
        distance=None if score is None or exact is None else sign * (score.value - exact.value),
        others={name: value for name, value in others.items() if value is not None},
        seconds=mean_of(run.seconds for run in runs),
        tokens_per_second=mean_of(run.tokens_per_second for run in runs),
        num_parameters=next((run.num_parameters for run in runs if run.num_parameters is not None), None),
        num_skipped_steps=sum(run.num_skipped_steps for run in runs),
        reasons=tuple(dict.fromkeys(run.reason for run in runs if run.reason is not None)),
    )
