"""Learning curves of the arena, at equal steps and at equal time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ..records import ArenaLook, ArenaRun, ArenaTaskResult, Line, LineChart
from .arena_rows import BASELINES, grouped, mean_of, unit
from .arena_tables import title_of

_TIMES = 20  # points of the axis of time, at which all curves are read


def learning_curves(result: ArenaTaskResult) -> tuple[LineChart, ...]:
    """The score on the validation split over steps, and over the time that training took."""
    runs = [run for run in result.runs if run.looks]
    if not runs:
        return ()
    task = result.task
    label = "validation accuracy (%)" if task.watched == "accuracy" else f"validation {task.watched}"
    steps = sorted({float(look.step) for run in runs for look in run.looks})
    end = max(run.looks[-1].seconds for run in runs)
    times = [end * (i + 1) / _TIMES for i in range(_TIMES)]
    note = "Mean over seeds; the band is their range."
    return tuple(
        LineChart(
            f"{title_of(result)} at equal {what}",
            x_label,
            label,
            (*(_line(name, group, task.watched, at, x) for name, group in grouped(runs).items()), *_trivial(result, x)),
            log_y=task.watched == "perplexity",
            note=text,
        )
        for what, x_label, x, at, text in (
            ("steps", "training steps", steps, _step, note),
            ("time", "seconds of training", times, _seconds, f"{note} Between two looks a curve is a straight line."),
        )
    )


def _step(look: ArenaLook) -> float:
    return float(look.step)


def _seconds(look: ArenaLook) -> float:
    return look.seconds


def _line(label: str, runs: list[ArenaRun], watched: str, at: Callable[[ArenaLook], float], x: Sequence[float]) -> Line:
    """Mean and range over the seeds, where all of them have a value."""
    curves = [[_value(run.looks, at, place) for run in runs] for place in x]
    whole = [(place, mean_of(values)) for place, values in zip(x, curves, strict=True) if None not in values]
    known = [(place, mean) for place, mean in whole if mean is not None]
    factor, several = unit(watched), len(runs) > 1
    return Line(
        label,
        tuple(place for place, _ in known),
        tuple(factor * mean.value for _, mean in known),
        tuple(factor * mean.low for _, mean in known) if several else (),
        tuple(factor * mean.high for _, mean in known) if several else (),
        is_baseline=label in BASELINES,
    )


def _value(looks: Sequence[ArenaLook], at: Callable[[ArenaLook], float], place: float) -> float | None:
    """The curve through the looks at a place; None outside of them, and beside a look without a score."""
    for first, second in pairwise(looks):
        start, end = at(first), at(second)
        if start <= place <= end and first.score is not None and second.score is not None:
            share = (place - start) / (end - start) if end > start else 0.0
            return first.score + share * (second.score - first.score)
    return next((look.score for look in looks if at(look) == place), None)


def _trivial(result: ArenaTaskResult, x: Sequence[float]) -> list[Line]:
    """What ignores the sequence, as a level; in a translation it is of another metric and left out."""
    task = result.task
    if task.metric != task.watched:
        return []
    level = unit(task.metric) * task.trivial_score
    return [Line(task.trivial_name, (x[0], x[-1]), (level, level), is_baseline=True)]
