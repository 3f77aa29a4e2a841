"""The tables of a report as text cells, for every rendering the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records import Audit, Config, LayerAudit, MechanismError, Report, Timing
from . import curves, words

NONE = "-"
"""A cell without a figure; a note under the table says why."""


@dataclass(frozen=True)
class Table:
    """Cells as text, with what one needs to read them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    num_text_columns: int = 1  # left-aligned ones, from the left; the rest are numbers
    collapsed: bool = False  # detail that a page may fold away


def frontier_table(report: Report) -> Table:
    """Quality and cost at every number of linear layers."""
    base = next((point for point in report.frontier if point.num_linear == 0), None)
    rows = []
    for point in report.frontier:
        ratio = NONE
        if base is not None and base.latency_ms and point.latency_ms and base.length == point.length:
            ratio = words.figure(point.latency_ms / base.latency_ms, 2)
        added = "none: the original"
        if point.linear_layers:
            config = shown_config(point.configs[-1]) if point.configs else ""
            added = f"{point.linear_layers[-1]}: {point.mechanisms[-1]}{config}"
        recommended = " (recommended)" if point.num_linear == report.verdict.recommended_num_linear >= 1 else ""
        rows.append(
            (
                f"{point.num_linear}{recommended}",
                added,
                words.figure(point.cosine_mean),
                words.figure(point.cosine_p05),
                NONE if point.neighbour_agreement is None else words.percent(point.neighbour_agreement),
                NONE if point.latency_ms is None else words.milliseconds(point.latency_ms),
                ratio,
                NONE if point.peak_bytes is None else words.size(point.peak_bytes),
            )
        )
    lengths = sorted({point.length for point in report.frontier})
    note = f"Latency and memory of one document of {' or '.join(map(words.count, lengths))} tokens." if lengths else ""
    columns = (
        "Linear layers",
        "Layer added",
        "Mean cosine",
        "5th percentile",
        "Same nearest neighbour",
        "Latency",
        "Over original",
        "Peak memory",
    )
    return Table("The frontier, least harmful layer first", columns, tuple(rows), (note,) if note else (), 2)


def timing_tables(report: Report, quantity: str) -> tuple[Table, ...]:
    """Latency or peak memory over the lengths: attention alone, then the whole model.

    Args:
        report: the report.
        quantity: ``latency_ms`` or ``peak_bytes``.
    """
    tables = []
    for scope, title in (("attention", "Attention alone"), ("model", "Whole model")):
        rows = curves.series(report.timings, scope)
        lengths = sorted({row.length for row in report.timings if row.scope == scope})
        if not rows or (quantity == "peak_bytes" and all(row.peak_bytes is None for row in report.timings)):
            continue
        baseline = {row.length: row for row in next(iter(rows.values()))}
        body = []
        for name, timings in rows.items():
            cells = {row.length: _timing_cell(row, baseline.get(row.length), quantity) for row in timings}
            body.append((name, *(cells.get(length, NONE) for length in lengths)))
        what = "latency" if quantity == "latency_ms" else "peak memory"
        columns = ("Subject", *(f"{words.count(length)} tokens" for length in lengths))
        starred = any(cell.startswith("*") for line in body for cell in line)
        notes = (f"* faster than {next(iter(rows))} by {curves.MARGIN:.0%} and outside the noise.",) if starred else ()
        missing = _reasons(
            (f"{row.subject} at {words.count(row.length)}", row.reason)
            for row in report.timings
            if row.scope == scope and row.reason and getattr(row, quantity) is None
        )
        tables.append(Table(f"{title}: {what}", columns, tuple(body), (*notes, *missing)))
    return tuple(tables)


def break_even_table(report: Report) -> Table:
    """From which length on each mechanism is faster than fused softmax."""
    rows = tuple(
        (
            row.subject,
            row.scope,
            "never, as measured" if row.length is None else f"{words.count(row.length)} tokens",
            row.note,
        )
        for row in report.break_even
    )
    return Table("Break-even lengths", ("Subject", "Scope", "Faster from", "Note"), rows, (), 4)


def audit_table(audit: Audit) -> Table:
    """Relative error of every mechanism on every layer, uniform first."""
    names = mechanism_labels(audit)
    body, missing = [], []
    for layer in audit.layers:
        found = errors_by_key(layer, names)
        cells = []
        for key in names:
            error = found.get(key)
            if error is None or error.rel_error is None:
                cells.append(NONE)
                if not layer.refused:
                    missing.append((f"{names[key]} on {layer.layer}", error.reason if error else "not audited"))
            else:
                # beyond what rounding makes of averaging itself
                worse = layer.uniform_rel_error is not None and error.rel_error > 1.001 * layer.uniform_rel_error
                cells.append(("* " if worse else "") + words.figure(error.rel_error))
        uniform = NONE if layer.uniform_rel_error is None else words.figure(layer.uniform_rel_error)
        body.append((layer.layer, uniform, *cells))
        if layer.refused:
            missing.append((layer.layer, layer.refused))
    notes = [*_reasons(missing)]
    if any(cell.startswith("*") for row in body for cell in row):
        notes.insert(0, "* worse than uniform, that is, than averaging all values.")
    columns = ("Layer", "uniform (baseline)", *names.values())
    return Table("Relative error of the attention output, by layer", columns, tuple(body), tuple(notes))


def head_tables(audit: Audit) -> tuple[Table, ...]:
    """The same errors by head, one table for each layer."""
    names, tables = mechanism_labels(audit), []
    for layer in audit.layers:
        errors = [error for error in layer.errors if error.rel_error_by_head]
        columns = ("Head", "uniform (baseline)", *(names[_key(error, names)] for error in errors))
        body = []
        for head, uniform in enumerate(layer.uniform_rel_error_by_head):
            cells = [
                words.figure(error.rel_error_by_head[head]) if head < len(error.rel_error_by_head) else NONE
                for error in errors
            ]
            body.append((str(head), words.figure(uniform), *cells))
        if body:
            tables.append(Table(f"{layer.layer}: relative error by head", columns, tuple(body), collapsed=True))
    return tuple(tables)


def statistics_tables(audit: Audit) -> tuple[Table, ...]:
    """What the heads do: means by layer, then every head."""
    fields = ("entropy_ratio", "logit_std", "q_norm", "k_norm", "radius")
    columns = ("Entropy ratio", "Logit spread", "Norm of q", "Norm of k", "Radius")
    means, single = [], []
    for layer in audit.layers:
        heads = layer.heads
        if heads:
            mean = [sum(getattr(head, name) for head in heads) / len(heads) for name in fields]
            means.append((layer.layer, str(len(heads)), *(words.figure(value, 2) for value in mean)))
        for number, head in enumerate(heads):
            single.append((layer.layer, str(number), *(words.figure(getattr(head, name), 2) for name in fields)))
    return (
        Table("Mean over the heads of a layer", ("Layer", "Heads", *columns), tuple(means)),
        Table("Every head", ("Layer", "Head", *columns), tuple(single), collapsed=True),
    )


def guarded_table(audit: Audit) -> Table | None:
    """Where a denominator had to be guarded or was negative; None where none was."""
    rows = tuple(
        (
            layer.layer,
            label(error),
            NONE if error.guarded_share is None else words.percent(error.guarded_share),
            NONE if error.negative_share is None else words.percent(error.negative_share),
        )
        for layer in audit.layers
        for error in layer.errors
        if error.guarded_share or error.negative_share
    )
    columns = ("Layer", "Mechanism", "Rows guarded", "Rows negative")
    return Table("Denominators guarded or negative", columns, rows, (), 2, collapsed=True) if rows else None


def rollout_table(report: Report) -> Table:
    """The stages: what runs, how much traffic, when to go on, when to go back."""
    rows = tuple(
        (stage.name, stage.action, stage.go_on_when, stage.go_back_when, words.percent(stage.traffic_share))
        for stage in report.rollout
    )
    columns = ("Stage", "What runs", "Go on when", "Go back when", "Answered by the converted model")
    return Table("Stages", columns, rows, (), 4)


def indicators_table(report: Report) -> Table:
    """What to watch in each stage, the threshold, and the measurement behind it."""
    rows = tuple(
        (stage.name, indicator.name, indicator.threshold, indicator.source)
        for stage in report.rollout
        for indicator in stage.indicators
    )
    return Table("Indicators and thresholds", ("Stage", "Indicator", "Threshold", "Supported by"), rows, (), 4)


def mechanism_labels(audit: Audit) -> dict[str, str]:
    """Column keys of the audited mechanisms and their labels; a configuration shows where a name comes twice."""
    twice: set[str] = set()
    for layer in audit.layers:
        seen = [error.mechanism for error in layer.errors]
        twice |= {name for name in seen if seen.count(name) > 1}
    labels = {}
    for layer in audit.layers:
        for error in layer.errors:
            key = label(error) if error.mechanism in twice else error.mechanism
            labels[key] = key
    return labels


def label(error: MechanismError) -> str:
    """A mechanism with the configuration that was asked for, which is the same on every layer.

    ``linformer (proj_len=64)``.
    """
    return f"{error.mechanism}{shown_config(error.config if error.asked is None else error.asked)}"


def errors_by_key(layer: LayerAudit, names: dict[str, str]) -> dict[str, MechanismError]:
    """The errors of a layer by the column keys of ``mechanism_labels``."""
    return {_key(error, names): error for error in layer.errors}


def _key(error: MechanismError, names: dict[str, str]) -> str:
    full = label(error)  # first: where a name comes several times, its default configuration is called by it alone
    return full if full in names else error.mechanism


def shown_config(config: Config) -> str:
    """Options in brackets, nested ones left out; of features ``counts=1+32+66``, those of each degree."""
    groups = config.get("heads")
    if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):  # a mechanism per head
        parts = [
            f"{words.plural(len(g['heads']), 'head')} {g['mechanism']}{shown_config(g['options'])}" for g in groups
        ]
        return f" ({', '.join(parts)})"
    shown = []
    for name, value in config.items():
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            shown.append(f"{name}={'+'.join(map(str, value))}")
        elif not isinstance(value, dict) and not (name == "num_features" and config.get("counts") is not None):
            shown.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return f" ({', '.join(shown)})" if shown else ""


def _timing_cell(row: Timing, baseline: Timing | None, quantity: str) -> str:
    if quantity == "peak_bytes":
        return NONE if row.peak_bytes is None else words.size(row.peak_bytes)
    if row.latency_ms is None:
        return NONE
    star = "* " if baseline is not None and baseline is not row and curves.is_faster(row, baseline) else ""
    return star + words.milliseconds(row.latency_ms)


def _reasons(missing: Iterable[tuple[str, str | None]]) -> Sequence[str]:
    """Things without a figure, grouped by the reason."""
    groups: dict[str, list[str]] = {}
    for thing, reason in missing:
        groups.setdefault(reason or "no reason stated", []).append(thing)
    return [f"No figure ({NONE}), {reason}: {', '.join(things)}." for reason, things in groups.items()]
