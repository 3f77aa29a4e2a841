"""The tables of the arena: scores over tasks, each task by itself, and what a training step costs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..records import ArenaCost, ArenaResult, ArenaTaskResult
from . import words
from .arena_rows import EXACT, Mean, Row, cost_of, ratio, rows_of, unit
from .sections import environment_rows
from .study_text import shown
from .tables import NONE, Table

UNFUSED = "softmax (unfused)"


def title_of(result: ArenaTaskResult) -> str:
    """The task and the preset, which stands where it is not the published length."""
    return f"{result.task.name} ({result.task.preset})"


def overview_table(found: ArenaResult) -> Table | None:
    """Scores of all mechanisms on all tasks; None where there is one task only."""
    if len(found.tasks) < 2:
        return None
    rows = [{row.label: row for row in rows_of(result)} for result in found.tasks]
    labels = list(dict.fromkeys(label for task in rows for label in task))
    columns = ("mechanism", *(f"{title_of(result)}, {_metric(result)}" for result in found.tasks))
    body = [
        (label, *(NONE if label not in task else score_text(task[label].score) for task in rows)) for label in labels
    ]
    body.append(("ignores the sequence", *(_trivial(result) for result in found.tasks)))
    note = "Mean over seeds ± standard deviation, on the test split. What ignores the sequence is named with each task."
    return Table("All tasks", columns, tuple(body), (note,), 1)


def score_table(result: ArenaTaskResult) -> Table:
    """Scores, beside what is trivial, and what training took."""
    task, rows = result.task, rows_of(result)
    others = [name for name in dict.fromkeys(n for row in rows for n in row.others) if name != "loss"]
    length = task.full_length
    has_costs = any(cost.length == length for cost in result.costs)
    columns = (
        "mechanism",
        _metric(result),
        "to softmax",
        "seeds",
        *(f"{name} (%)" if name == "accuracy" else name for name in others),
        *((f"times faster at {length:,}", "times less memory") if has_costs else ()),
        "training (s)",
        "tokens/s",
        "parameters",
    )
    body = [_score_row(result, row, others, has_costs) for row in rows]
    empty = (NONE,) * (len(columns) - 4)
    body.append((task.trivial_name, _trivial(result), _distance_text(_trivial_distance(result, rows)), NONE, *empty))
    notes = [_sentence(note) for note in task.notes]
    if task.length != length and has_costs:
        notes.append(
            f"Trained on {task.length:,} positions; a step is measured at {length:,}, the length of the full task."
        )
    notes.append(
        f"{task.num_train:,} examples to train on, {task.num_valid:,} held out of them to choose the checkpoint, "
        f"{task.num_test:,} to test on. ± is the standard deviation over seeds."
    )
    if has_costs:
        notes.append("Times and memory are those of fused softmax over those of the mechanism, forward and backward.")
    notes += [f"{row.label}: {reason}" for row in rows for reason in row.reasons]
    notes += [f"{row.label}: {row.num_skipped_steps} steps were not finite" for row in rows if row.num_skipped_steps]
    return Table(f"{title_of(result)}: {_metric(result)} on the test split", columns, tuple(body), tuple(notes), 1)


def cost_tables(result: ArenaTaskResult) -> tuple[Table, ...]:
    """Latency and memory of a training step, for each length that was measured."""
    lengths = sorted({cost.length for cost in result.costs})
    return tuple(_cost_table(result, length) for length in lengths)


def conditions_table(found: ArenaResult) -> Table:
    """Settings of every task, and the machine."""
    rows: list[tuple[str, str]] = []
    for result in found.tasks:
        rows += [
            (f"{title_of(result)}: {name}", value if isinstance(value, str) else json.dumps(value))
            for name, value in result.settings.items()
        ]
    machine = next((run.environment for result in found.tasks for run in result.runs if run.environment), None)
    rows += environment_rows(found.environment if machine is None else machine)
    rows.append(("Figures", "all of them, the losses too, in arena.json"))
    return Table("Conditions", ("What", "Value"), tuple(rows), (), 2)


def score_text(mean: Mean | None) -> str:
    """``62.1 ± 0.8``; the mean alone of a single seed."""
    if mean is None:
        return NONE
    value = f"{mean.value:.1f}" if abs(mean.value) >= 10 else f"{mean.value:.2f}"
    if mean.spread is None:
        return value
    return f"{value} ± {mean.spread:.1f}" if abs(mean.value) >= 10 else f"{value} ± {mean.spread:.2f}"


def _score_row(result: ArenaTaskResult, row: Row, others: Sequence[str], has_costs: bool) -> tuple[str, ...]:
    length = result.task.full_length
    cost, exact = cost_of(result, row.label, length), cost_of(result, EXACT, length)
    factors: tuple[str, ...] = ()
    if has_costs:
        faster = ratio(cost.latency_ms if cost else None, exact.latency_ms if exact else None)
        less = ratio(cost.peak_bytes if cost else None, exact.peak_bytes if exact else None)
        factors = tuple(NONE if value is None else f"{value:.2f}" for value in (faster, less))
    return (
        row.label,
        score_text(row.score),
        _distance_text(row.distance),
        NONE if row.score is None else str(row.score.num),
        *(score_text(row.others.get(name)) for name in others),
        *factors,
        NONE if row.seconds is None else shown(row.seconds.value),
        NONE if row.tokens_per_second is None else f"{row.tokens_per_second.value:,.0f}",
        NONE if row.num_parameters is None else f"{row.num_parameters:,}",
    )


def _cost_table(result: ArenaTaskResult, length: int) -> Table:
    costs = [cost for cost in result.costs if cost.length == length]
    exact, unfused = (cost_of(result, label, length) for label in (EXACT, UNFUSED))
    columns = (
        "mechanism",
        "step (ms)",
        "quartiles (ms)",
        "times faster",
        "memory",
        "times less",
        "than unfused",
        "runs",
    )
    body = [_cost_row(cost, exact, unfused) for cost in costs]
    batch = costs[0].batch_size
    notes = [
        f"Forward and backward of {words.plural(batch, 'sequence')} of {length:,} positions, in turns in one run; "
        "memory is what is held beyond model and batch. Times are those of fused softmax over those of the mechanism."
    ]
    notes += [f"{cost.label}: {cost.reason}" for cost in costs if cost.reason]
    title = f"{title_of(result)}: cost of a training step at {length:,} positions"
    return Table(title, columns, tuple(body), tuple(notes), 1)


def _cost_row(cost: ArenaCost, exact: ArenaCost | None, unfused: ArenaCost | None) -> tuple[str, ...]:
    def factor(value: float | None, to: float | None) -> str:
        found = ratio(value, to)
        return NONE if found is None else f"{found:.2f}"

    quartiles = NONE
    if cost.latency_ms_low is not None and cost.latency_ms_high is not None:
        quartiles = f"{shown(cost.latency_ms_low)} to {shown(cost.latency_ms_high)}"
    return (
        cost.label,
        NONE if cost.latency_ms is None else shown(cost.latency_ms),
        quartiles,
        factor(cost.latency_ms, exact.latency_ms if exact else None),
        NONE if cost.peak_bytes is None else words.size(cost.peak_bytes),
        factor(cost.peak_bytes, exact.peak_bytes if exact else None),
        factor(cost.peak_bytes, unfused.peak_bytes if unfused else None),
        str(cost.num_runs) if cost.num_runs else NONE,
    )


def _sentence(note: str) -> str:
    """A note of a task with a capital and a full stop."""
    return f"{note[:1].upper()}{note[1:]}{'' if note.endswith('.') else '.'}"


def _metric(result: ArenaTaskResult) -> str:
    return {"accuracy": "accuracy (%)", "bleu": "BLEU"}.get(result.task.metric, result.task.metric)


def _trivial(result: ArenaTaskResult) -> str:
    value = unit(result.task.metric) * result.task.trivial_score
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _trivial_distance(result: ArenaTaskResult, rows: Sequence[Row]) -> float | None:
    exact = next((row.score for row in rows if row.label == EXACT), None)
    if exact is None:
        return None
    sign = 1 if result.task.higher_is_better else -1
    return sign * (unit(result.task.metric) * result.task.trivial_score - exact.value)


def _distance_text(distance: float | None) -> str:
    return NONE if distance is None else f"{distance:+.1f}" if abs(distance) >= 10 else f"{distance:+.2f}"
