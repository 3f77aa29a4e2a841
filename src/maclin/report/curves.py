"""Latency curves out of timings: select, compare, interpolate. What was not measured is never made up."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from ..records import Timing

MARGIN = 0.05
"""Least gain that counts as faster: 5 % of the median."""

Curve = tuple[Timing, ...]
"""Measured timings of one subject, by increasing length."""


def curve(timings: Sequence[Timing], subject: str, scope: str) -> Curve:
    """The measured timings of one subject, by increasing length; the first where a length comes twice."""
    rows: dict[int, Timing] = {}
    for row in timings:
        if row.subject == subject and row.scope == scope and _measured(row):
            rows.setdefault(row.length, row)
    return tuple(rows[length] for length in sorted(rows))


def series(timings: Sequence[Timing], scope: str) -> dict[str, tuple[Timing, ...]]:
    """All timings of a scope by label and length, measured or not; fused softmax and the original first.

    A converted model is labelled by its number of linear layers.
    """
    rows: dict[str, list[Timing]] = {}
    for row in timings:
        if row.scope == scope:
            label = row.subject if row.num_linear is None else f"{row.subject}, {row.num_linear} linear"
            rows.setdefault(label, []).append(row)
    names = sorted(rows, key=lambda name: name not in ("softmax", "original"))
    return {name: tuple(sorted(rows[name], key=lambda row: row.length)) for name in names}


def converted_curve(timings: Sequence[Timing], num_linear: int | None = None) -> tuple[Curve, int | None]:
    """The curve of the converted model, and how many of its layers were linear.

    Args:
        timings: all timings of a report.
        num_linear: the wanted number of linear layers; None takes the most linear model that was timed.

    Returns:
        The curve and its number of layers; the curve is empty where that model was not timed.

    Raises:
        ValueError: a timing of a converted model does not say how many layers were linear.
    """
    rows = [row for row in timings if row.scope == "model" and row.subject == "converted"]
    numbers = [row.num_linear for row in rows if row.num_linear is not None]
    if len(numbers) < len(rows):
        raise ValueError("wanted num_linear on every timing of subject 'converted', got None; say how many layers were")
    if num_linear is None:
        num_linear = max(numbers, default=None)
    return curve([row for row in rows if row.num_linear == num_linear], "converted", "model"), num_linear


def is_faster(new: Timing, old: Timing) -> bool:
    """Whether the median is lower by the margin and the quartile bands, where measured, do not overlap."""
    if new.latency_ms is None or old.latency_ms is None or new.latency_ms > (1 - MARGIN) * old.latency_ms:
        return False
    high = new.latency_ms if new.latency_ms_high is None else new.latency_ms_high
    low = old.latency_ms if old.latency_ms_low is None else old.latency_ms_low
    return high < low


def shared(new: Curve, old: Curve) -> tuple[tuple[Timing, Timing], ...]:
    """Pairs (new, old) at the lengths where both were measured, by increasing length."""
    by_length = {row.length: row for row in old}
    return tuple((row, by_length[row.length]) for row in new if row.length in by_length)


def pays_from(new: Curve, old: Curve) -> int | None:
    """Smallest measured length from which on ``new`` is faster at every measured length; None if never."""
    start = None
    for row, other in reversed(shared(new, old)):
        if not is_faster(row, other):
            break
        start = row.length
    return start


def latency_at(rows: Curve, length: int) -> float | None:
    """Latency at a length, straight between measured points in log latency over log length.

    Args:
        rows: one curve.
        length: tokens.

    Returns:
        Milliseconds, or None outside the measured lengths: nothing is extrapolated.
    """
    lengths = [row.length for row in rows]
    if not rows or not lengths[0] <= length <= lengths[-1]:
        return None
    right = bisect_left(lengths, length)
    upper = rows[right].latency_ms
    if lengths[right] == length:
        return upper
    lower = rows[right - 1].latency_ms
    if upper is None or lower is None:
        return None
    share = math.log(length / lengths[right - 1]) / math.log(lengths[right] / lengths[right - 1])
    return math.exp((1 - share) * math.log(lower) + share * math.log(upper))


def _measured(row: Timing) -> bool:
    return row.latency_ms is not None and math.isfinite(row.latency_ms) and row.latency_ms > 0
