"""From which length on something pays, and how fast its cost grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from maclin.records import BreakEven, Timing


def break_even(timings: Iterable[Timing], scope: str, baseline: str | None = None) -> list[BreakEven]:
    """The smallest measured length from which on each subject is faster at every larger measured length.

    Medians are compared, at lengths where both were measured; nothing is interpolated. The note says where
    both were measured, and at which lengths that count the quartile bands overlap ("within noise").

    Args:
        timings: measured side by side; rows of other scopes are left out.
        scope: "attention" or "model".
        baseline: the subject to compare with; by default "softmax" for attention and "original" for models.

    Returns:
        One record for each other subject, in the order in which the subjects appear.

    Raises:
        ValueError: ``timings`` has no row of the baseline in that scope.
    """
    rows = [row for row in timings if row.scope == scope]
    if baseline is None:
        baseline = "softmax" if scope == "attention" else "original"
    subjects = list(dict.fromkeys(row.subject for row in rows))
    if baseline not in subjects:
        raise ValueError(f"wanted timings of the baseline {baseline!r} in scope {scope!r}, got those of {subjects}")
    reference = _measured(rows, baseline)
    return [
        _compare(subject, scope, _measured(rows, subject), reference, baseline)
        for subject in subjects
        if subject != baseline
    ]


def growth_exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent e of values = c * lengths^e, by least squares on the logarithms.

    Args:
        lengths: at least two different positive numbers.
        values: positive, as many as ``lengths``.

    Raises:
        ValueError: fewer than two different lengths, different numbers of both, or a number that is not positive.
    """
    if len(lengths) != len(values) or len(set(lengths)) < 2 or min(*lengths, *values) <= 0:
        raise ValueError(
            f"wanted at least two different lengths and as many values, all positive; got {list(lengths)} and "
            f"{list(values)}"
        )
    xs, ys = [math.log(x) for x in lengths], [math.log(y) for y in values]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def _measured(rows: Iterable[Timing], subject: str) -> dict[int, Timing]:
    return {row.length: row for row in rows if row.subject == subject and row.latency_ms is not None}


def _compare(
    subject: str, scope: str, own: dict[int, Timing], reference: dict[int, Timing], baseline: str
) -> BreakEven:
    common = sorted(own.keys() & reference.keys())
    if not common:
        return BreakEven(subject, scope, None, f"no length at which both it and {baseline} were measured")
    where = f"at {common[0]} tokens" if len(common) == 1 else f"from {common[0]} to {common[-1]} tokens"
    winning: list[int] = []
    for length in reversed(common):
        if _latency(own[length]) >= _latency(reference[length]):
            break
        winning.insert(0, length)
    if not winning:
        return BreakEven(
            subject, scope, None, f"not faster than {baseline} at {common[-1]} tokens; both measured {where}"
        )
    note = f"both measured {where}"
    if winning == common:
        note += "; faster at all of them, so that it may pay at shorter lengths too"
    noisy = [str(length) for length in winning if _overlap(own[length], reference[length])]
    if noisy:
        note += f"; within noise at {', '.join(noisy)} (the quartile bands overlap)"
    return BreakEven(subject, scope, winning[0], note)


def _latency(row: Timing) -> float:
    return math.nan if row.latency_ms is None else row.latency_ms


def _overlap(a: Timing, b: Timing) -> bool:
    low_a, high_a = _band(a)
    low_b, high_b = _band(b)
    return low_a <= high_b and low_b <= high_a


def _band(row: Timing) -> tuple[float, float]:
    middle = _latency(row)
    return (
        middle if row.latency_ms_low is None else row.latency_ms_low,
        middle if row.latency_ms_high is None else row.latency_ms_high,
    )
