"""Charts as plain plotly figures: data and layout as JSON values. Colours of text and grid come from the page."""

from __future__ import annotations

import html
import math
from typing import Any

from ..records import Report, Timing
from . import curves, words
from .tables import errors_by_key, mechanism_labels
from .verdict import GO_COSINE

Figure = dict[str, Any]
"""``data`` and ``layout``, as ``plotly.graph_objects.Figure`` takes them."""

EXACT = "#d1495b"
"""Colour of what is exact: fused softmax, the original."""
LINEAR = ("#2f7fc1", "#2a9d8f", "#8e6bbf", "#c98a1b", "#5a9e3a", "#c2588b", "#7a8aa0", "#a0703c")
"""Colours of what is linear."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


def charts(report: Report) -> dict[str, Figure]:
    """Every chart that the report has numbers for, by key."""
    found = {
        "frontier": _frontier(report),
        "latency-attention": _timing(report, "attention", "latency_ms"),
        "latency-model": _timing(report, "model", "latency_ms"),
        "memory-attention": _timing(report, "attention", "peak_bytes"),
        "memory-model": _timing(report, "model", "peak_bytes"),
        "audit": _audit(report),
    }
    return {key: figure for key, figure in found.items() if figure is not None}


def _frontier(report: Report) -> Figure | None:
    points = report.frontier
    if not points:
        return None
    x = [point.num_linear for point in points]
    lines: list[tuple[str, list[float | None], str, str]] = [
        ("mean cosine", [p.cosine_mean for p in points], LINEAR[0], "y"),
        ("5th percentile of the cosine", [p.cosine_p05 for p in points], LINEAR[2], "y"),
        ("same nearest neighbour", [p.neighbour_agreement for p in points], LINEAR[3], "y"),
        ("latency, ms", [p.latency_ms for p in points], EXACT, "y2"),
    ]
    shown = [line for line in lines if any(_finite(value) is not None for value in line[1])]
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": x,
            "y": [_finite(value) for value in values],
            "yaxis": axis,
            "line": {"color": colour, "width": 2.5},
            "marker": {"symbol": SYMBOLS[i], "size": 8},
        }
        for i, (name, values, colour, axis) in enumerate(shown)
    ]
    two = any(line[3] == "y2" for line in shown)
    layout: Figure = {
        "height": 520 if two else 360,
        "xaxis": {
            "title": {"text": "linear layers"},
            "dtick": max(1, len(points) // 12),
            "anchor": "y2" if two else "y",
        },
        "yaxis": {"title": {"text": "quality"}, "domain": [0.42, 1.0] if two else [0.0, 1.0]},
        "shapes": [_line("y", GO_COSINE, LINEAR[0])],
        "annotations": [_note(f"bar for the mean cosine: {GO_COSINE}", x=1, xref="paper", y=GO_COSINE, yref="y")],
    }
    if two:
        top = max(value for value in (_finite(p.latency_ms) for p in points) if value is not None)
        layout["yaxis2"] = {"title": {"text": "latency, ms"}, "domain": [0.0, 0.32], "range": [0, 1.1 * top]}
    chosen = report.verdict.recommended_num_linear
    if chosen >= 1:
        layout["shapes"].append(_line("x", chosen, "#888888"))
        layout["annotations"].append(_note("recommended", x=chosen, xref="x", y=0.42, yref="paper", xanchor="left"))
    return {"data": data, "layout": layout}


def _timing(report: Report, scope: str, quantity: str) -> Figure | None:
    used = {name for point in report.frontier for name in point.mechanisms}
    data: list[Figure] = []
    lengths: set[int] = set()
    for label, rows in curves.series(report.timings, scope).items():
        points = [(row.length, value) for row in rows if (value := _quantity(row, quantity)) is not None]
        if not points:
            continue
        lengths.update(length for length, _ in points)
        exact = label in ("softmax", "original")
        strong = exact or scope == "model" or label in used
        number = len(data)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(f"{label} (fused, exact)" if label == "softmax" else label, quote=False),
                "x": [length for length, _ in points],
                "y": [value for _, value in points],
                "opacity": 1.0 if strong else 0.8,
                "line": {
                    "color": EXACT if exact else LINEAR[(number - 1) % len(LINEAR)],
                    "width": 3.5 if exact else 2.5 if strong else 1.4,
                    "dash": "solid" if strong else "dot",
                },
                "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8 if strong else 6},
            }
        )
    if not data:
        return None
    ticks = sorted(lengths)
    unit = "latency, ms" if quantity == "latency_ms" else "peak memory, MiB"
    layout: Figure = {
        "height": 480,
        "xaxis": {
            "type": "log",
            "title": {"text": "tokens"},
            "tickvals": ticks,
            "ticktext": [words.count(length) for length in ticks],
        },
        "yaxis": {"type": "log", "title": {"text": unit}, "tickformat": "~g", "nticks": 8},
        "shapes": [],
        "annotations": [],
    }
    limit = report.model.max_length
    if scope == "attention" and limit is not None and ticks[0] < limit < ticks[-1]:
        layout["shapes"].append(_line("x", limit, "#888888"))
        text = f"limit of the model: {words.count(limit)}"
        layout["annotations"].append(_note(text, x=math.log10(limit), xref="x", y=1, yref="paper", xanchor="left"))
    return {"data": data, "layout": layout}


def _audit(report: Report) -> Figure | None:
    layers = report.audit.layers
    if not layers:
        return None
    names = mechanism_labels(report.audit)
    rows = []
    for layer in layers:
        found = errors_by_key(layer, names)
        errors = [found[key].rel_error if key in found else None for key in names]
        rows.append([_finite(layer.uniform_rel_error), *map(_finite, errors)])
    columns = ["uniform", *(html.escape(name, quote=False) for name in names.values())]
    trace = {
        "type": "heatmap",
        "z": rows,
        "x": columns,
        "y": [html.escape(layer.layer, quote=False) for layer in layers],
        "zmin": 0,
        "zmax": 1,
        "texttemplate": "%{z:.2f}",
        "hovertemplate": "%{y}<br>%{x}: %{z:.3f}<extra></extra>",
        "colorscale": [[0, "#1b7f79"], [0.5, "#f2e8cf"], [1, "#b5442e"]],
        "colorbar": {"title": {"text": "relative error"}, "thickness": 12},
        "xgap": 2,
        "ygap": 2,
    }
    layout = {
        "height": 190 + 30 * len(layers),
        "xaxis": {"side": "top", "tickangle": -40, "automargin": True, "type": "category"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "shapes": [],
        "annotations": [],
    }
    return {"data": [trace], "layout": layout}


def _line(axis: str, value: float, colour: str) -> Figure:
    line = {"type": "line", "line": {"color": colour, "width": 1.8, "dash": "dash"}}
    if axis == "x":
        return {**line, "x0": value, "x1": value, "xref": "x", "y0": 0, "y1": 1, "yref": "paper"}
    return {**line, "y0": value, "y1": value, "yref": "y", "x0": 0, "x1": 1, "xref": "paper"}


def _note(text: str, *, x: float, xref: str, y: float, yref: str, xanchor: str = "right") -> Figure:
    place = {"x": x, "xref": xref, "y": y, "yref": yref, "xanchor": xanchor, "yanchor": "bottom"}
    return {"text": text, "showarrow": False, "font": {"size": 11}, **place}


def _quantity(row: Timing, quantity: str) -> float | None:
    value = row.latency_ms if quantity == "latency_ms" else row.peak_bytes
    if value is None or not math.isfinite(value) or value <= 0:
        return None
    return value if quantity == "latency_ms" else value / 2**20


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
