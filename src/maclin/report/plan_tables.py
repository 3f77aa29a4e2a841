"""The tables of a plan: what becomes of each layer, the frontier, and every candidate."""

from __future__ import annotations

from ..records import Plan, Report
from . import words
from .tables import NONE, Table, shown_config


def plan_table(report: Report) -> Table:
    """What becomes of each layer within the tolerance, and the best linear choice whether taken or not."""
    plan, rows = report.plan, []
    for row in plan.rows:
        best = NONE if row.best_linear is None else f"{row.best_linear}{shown_config(row.best_linear_config)}"
        rows.append(
            (
                row.layer,
                "softmax (stays exact)" if row.mechanism == "softmax" else f"{row.mechanism}{shown_config(row.config)}",
                best,
                row.reason,
                NONE if row.rel_error is None else words.figure(row.rel_error),
                NONE if row.best_linear_rel_error is None else words.figure(row.best_linear_rel_error),
            )
        )
    columns = ("Layer", "Becomes", "Best of linear cost", "Reason", "Error", "Error of the best linear")
    title = (
        f"Plan {plan.budget}"
        if plan.speedup is not None or plan.tolerance is None
        else (f"Plan at a tolerance of {plan.tolerance:g}")
    )
    if any(row.relative_cost is not None for row in plan.rows):
        columns += ("Cost over exact", "Latency", "Exact latency")
        rows = [
            (
                *cells,
                NONE if row.relative_cost is None else words.figure(row.relative_cost),
                NONE if row.latency_ms is None else words.milliseconds(row.latency_ms),
                NONE if row.exact_latency_ms is None else words.milliseconds(row.exact_latency_ms),
            )
            for cells, row in zip(rows, plan.rows, strict=True)
        ]
    return Table(title, columns, tuple(rows), (_cost_note(plan),) if plan.relative_cost else (), 4)


def plan_frontier_table(report: Report) -> Table | None:
    """The plans that no other beats in cost and error both, or None where the plan holds none."""
    plan = report.plan
    rows = tuple(
        (
            words.figure(1.0 / point.relative_cost, 2) if point.relative_cost else NONE,
            words.figure(point.rel_error),
            str(point.num_linear),
            str(point.num_changed),
            NONE if point.attention_ms is None else words.milliseconds(point.attention_ms),
        )
        for point in plan.frontier
    )
    what = "predicted relative error of the model's output" if plan.predicts_output else "root mean square over layers"
    columns = ("Speed-up of attention", "Error", "Layers of linear cost", "Layers changed", "Attention")
    return Table("Time against error", columns, rows, (f"Error: {what}.",), 0, collapsed=True) if rows else None


def _cost_note(plan: Plan) -> str:
    if plan.costs != "measured":
        return f"Costs are multiply-adds at {words.count(plan.length)} tokens."
    return f"Costs are latencies of one call at {words.count(plan.length)} tokens on {plan.device}."


def alternatives_table(report: Report) -> Table:
    """Every candidate of every plan row, with what speaks for and against it."""
    rows = tuple(
        (
            row.layer,
            f"{option.mechanism}{shown_config(option.config)}",
            "yes" if option.within_tolerance else "no",
            option.note,
            NONE if option.rel_error is None else words.figure(option.rel_error),
            NONE if option.relative_cost is None else words.figure(option.relative_cost),
        )
        for row in report.plan.rows
        for option in row.alternatives
    )
    columns = ("Layer", "Candidate", "Within tolerance", "Note", "Error", "Cost over exact")
    return Table("Every candidate of every layer", columns, rows, (), 4, collapsed=True)
