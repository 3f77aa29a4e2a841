"""What the tables of the arena say, in sentences; the comparison with softmax first."""

from __future__ import annotations

from ..records import ArenaResult, ArenaTaskResult
from .arena_rows import AVERAGING, EXACT, LEARNS, Row, cost_of, counts, ratio, rows_of
from .arena_tables import score_text, title_of

QUESTION = "How do the mechanisms compare when a model is trained from scratch with each of them?"
WITHIN = 1.0
"""Points below softmax that count as equal to it."""


def findings_of(found: ArenaResult) -> tuple[str, ...]:
    """At most one sentence on all tasks, then some on each."""
    sentences = [*_sum(found)]
    for result in found.tasks:
        sentences += [*_scores(result), *_costs(result)]
    return tuple(sentences)


def _sum(found: ArenaResult) -> list[str]:
    counted = [result for result in found.tasks if counts(result)]
    if not counted:
        return []
    names = ", ".join(title_of(result) for result in counted)
    equal: dict[str, int] = {}
    tried: dict[str, int] = {}
    for result in counted:
        for row in rows_of(result):
            if row.label == EXACT or row.label == AVERAGING:
                continue
            tried[row.label] = tried.get(row.label, 0) + 1
            equal[row.label] = equal.get(row.label, 0) + (row.distance is not None and row.distance >= -WITHIN)
    if not tried:
        return []
    best = sorted(tried, key=lambda label: (-equal[label], label))
    shares = ", ".join(f"{label} on {equal[label]} of {tried[label]}" for label in best)
    return [
        f"Where softmax is at least {LEARNS:g} points above averaging ({names}), these are within {WITHIN:g} point of "
        f"softmax or better: {shares}."
    ]


def _scores(result: ArenaTaskResult) -> list[str]:
    rows = [row for row in rows_of(result) if row.score is not None]
    if not rows:
        return [f"{title_of(result)}: no mechanism could do the task."]
    sign = 1 if result.task.higher_is_better else -1
    best = max(rows, key=lambda row: sign * (row.score.value if row.score else 0.0))
    unit = {"accuracy": " %", "bleu": " BLEU"}.get(result.task.metric, f" {result.task.metric}")
    known = {row.label: row for row in rows}
    parts = [f"{best.label} is best with {score_text(best.score)}{unit}"]
    for label in (EXACT, AVERAGING):
        if label in known and label != best.label:
            parts.append(f"{label} has {score_text(known[label].score)}")
    text = f"{title_of(result)}: {', '.join(parts)}."
    if counts(result) is False:
        text += f" Softmax is less than {LEARNS:g} points above averaging, so the task tells mechanisms apart poorly."
    return [text]


def _costs(result: ArenaTaskResult) -> list[str]:
    length = result.task.full_length
    exact = cost_of(result, EXACT, length)
    if exact is None or exact.latency_ms is None:
        return []
    rows: list[tuple[float, float | None, Row]] = []
    for row in rows_of(result):
        cost = cost_of(result, row.label, length)
        faster = ratio(cost.latency_ms if cost else None, exact.latency_ms)
        if row.label not in (EXACT, AVERAGING) and cost is not None and faster is not None:
            rows.append((faster, ratio(cost.peak_bytes, exact.peak_bytes), row))
    if not rows:
        return []
    parts = [
        f"{row.label} {faster:.1f}" + ("" if less is None else f" ({less:.1f})")
        for faster, less, row in sorted(rows, key=lambda item: -item[0])
    ]
    return [
        f"{title_of(result)}: times faster than fused softmax in a training step of {length:,} positions, and in "
        f"brackets times less memory: {', '.join(parts)}."
    ]
