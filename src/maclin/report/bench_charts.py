"""Charts of a result of ``maclin bench``: latency with its floor, share of the floor, memory."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..records import BenchResult, BenchRow, Line, LineChart
from . import words
from .bench_tables import BASELINE
from .charts import EXACT, LINEAR, Figure
from .study_charts import line_figure
from .study_text import chart_table
from .tables import Table

_BARS = 3  # lengths in the chart of shares, the longest
_FLOOR_WIDTH = 1.6


@dataclass(frozen=True)
class Drawing:
    """A chart of the page, and its numbers."""

    key: str
    title: str
    notes: tuple[str, ...]
    figure: Figure
    table: Table


def bench_drawings(result: BenchResult) -> list[Drawing]:
    """Every chart that the result has numbers for."""
    found = [_latency(result), _shares(result), _memory(result)]
    return [drawing for drawing in found if drawing is not None]


def _latency(result: BenchResult) -> Drawing | None:
    chart = _chart(result, "Latency", "latency, ms", lambda row: row.timing.latency_ms, spread=True)
    if chart is None:
        return None
    figure = line_figure(chart)
    _mark_softmax(figure)
    colours = {trace["name"]: trace["line"]["color"] for trace in figure["data"] if "name" in trace}
    lowest: list[float] = []
    for line in chart.lines:
        floors = {
            row.timing.length: row.floor.ms for row in result.rows if row.timing.subject == line.name and row.floor
        }
        y = [floors.get(int(x)) for x in line.x]
        if any(y):
            lowest.append(min(value for value in y if value))
            figure["data"].append(_floor_trace(line, y, colours[_escaped(line.name)]))
    if lowest:
        # the axis was laid out for the latencies; the floors lie below
        top = figure["layout"]["yaxis"]["range"][1]
        figure["layout"]["yaxis"] = {
            "title": figure["layout"]["yaxis"]["title"],
            "type": "log",
            "range": [math.log10(min(lowest)) - 0.1, top],
            "tickformat": "~g",
            "nticks": 10,
        }
    notes = ("Dashed, in the colour of each: the least time that this machine allows. Bands: quartiles.",)
    return Drawing("latency", chart.title, notes, figure, chart_table(chart))


def _mark_softmax(figure: Figure) -> None:
    """The baseline in its own colour and solid, since dashes are floors."""
    for trace in figure["data"]:
        if trace.get("name") == BASELINE:
            trace["line"] = {"color": EXACT, "width": 3}


def _floor_trace(line: Line, y: list[float | None], colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"floor of {_escaped(line.name)}",
        "legendgroup": _escaped(line.name),
        "showlegend": False,
        "x": list(line.x),
        "y": y,
        "line": {"color": colour, "width": _FLOOR_WIDTH, "dash": "4px,4px"},
        "hovertemplate": "%{x:.3~g}: %{y:.3~g}",
    }


def _shares(result: BenchResult) -> Drawing | None:
    lengths = sorted({row.timing.length for row in result.rows if row.share_of_floor is not None})[-_BARS:]
    subjects = [name for name in _subjects(result) if _share(result, name, lengths)]
    if not lengths or not subjects:
        return None
    data = []
    rows = []
    for i, length in enumerate(lengths):
        shares = [_share(result, name, [length]) for name in subjects]
        percents = [None if share is None else 100 * share for share in shares]
        data.append(
            {
                "type": "bar",
                "name": f"{length:,}",
                "x": [_escaped(name) for name in subjects],
                "y": percents,
                "text": ["" if value is None else f"{value:.0f}" for value in percents],
                "textposition": "outside",
                "marker": {"color": LINEAR[i % len(LINEAR)]},
                "hovertemplate": "%{x}, " + f"{length:,}" + ": %{y:.3~g} %<extra></extra>",
            }
        )
    for name in subjects:
        rows.append((name, *(words.percent(_share(result, name, [length])) for length in lengths)))
    top = max(value for trace in data for value in trace["y"] if value is not None)
    layout: Figure = {
        "height": 460,
        "barmode": "group",
        "xaxis": {"type": "category", "tickangle": -25 if len(subjects) > 4 else 0, "automargin": True},
        "yaxis": {"title": {"text": "floor over latency, %"}, "range": [0, max(1.12 * top, 10.0)]},
        "legend": {"title": {"text": "tokens"}},
        "shapes": [],
        "annotations": [],
    }
    title = "Share of what this machine allows"
    notes = ("100 % is the time that moving the bytes or multiplying the numbers takes by itself.",)
    columns = ("Attention", *(f"{length:,}" for length in lengths))
    return Drawing("shares", title, notes, {"data": data, "layout": layout}, Table(title, columns, tuple(rows)))


def _memory(result: BenchResult) -> Drawing | None:
    if result.what == "decode":
        chart = _chart(result, "Size of the state", "MiB", lambda row: (row.given_bytes or 0) / 2**20)
    else:
        chart = _chart(result, "Peak memory beyond the inputs", "MiB", lambda row: (row.timing.peak_bytes or 0) / 2**20)
    if chart is None:
        return None
    figure = line_figure(chart)
    _mark_softmax(figure)
    return Drawing("memory", chart.title, (), figure, chart_table(chart))


def _chart(
    result: BenchResult, title: str, label: str, value: Callable[[BenchRow], float | None], spread: bool = False
) -> LineChart | None:
    lines = []
    for name in _subjects(result):
        rows = [row for row in result.rows if row.timing.subject == name and value(row)]
        if not rows:
            continue
        low = tuple(row.timing.latency_ms_low for row in rows) if spread else ()
        high = tuple(row.timing.latency_ms_high for row in rows) if spread else ()
        x = tuple(float(row.timing.length) for row in rows)
        lines.append(Line(name, x, tuple(value(row) for row in rows), low, high, is_baseline=name == BASELINE))
    if not lines:
        return None
    x_label = "position (tokens before)" if result.what == "decode" else "tokens"
    return LineChart(title, x_label, label, tuple(lines), log_x=True, log_y=True)


def _subjects(result: BenchResult) -> list[str]:
    return list(dict.fromkeys(row.timing.subject for row in result.rows))


def _share(result: BenchResult, name: str, lengths: list[int]) -> float | None:
    found = [row.share_of_floor for row in result.rows if row.timing.subject == name and row.timing.length in lengths]
    known = [share for share in found if share is not None]
    return known[-1] if known else None


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)
