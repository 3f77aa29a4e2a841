"""Line charts and heat maps of a study as plain plotly figures, as ``charts`` makes those of a report."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence

from ..records import HeatMap, Line, LineChart
from .charts import LINEAR, SYMBOLS, Figure
from .study_text import NOT_AVAILABLE, shown

BASELINE = ("#4a4f57", "#8c6d2f", "#7d4b6c", "#3f6f5a")
"""Colours of baselines, which are drawn dashed."""
DASHES = ("5px,4px", "11px,4px", "9px,4px,2px,4px", "5px,4px,5px,8px")

_DARK = "#1d2430"  # text that every colour below is light enough for
_SEQUENTIAL = [[0, "#faf6ec"], [0.5, "#b9d7e8"], [1, "#6ea8cf"]]
_DIVERGING = [[0, "#7fb0d9"], [0.5, "#f7f7f4"], [1, "#e69c86"]]
_NOTHING = "#dfe2e6"
_FEW = 9  # x values that all get a tick, and markers
_WIDE = 30  # ratio of the largest to the smallest value from which on the colours of a heat map are logarithmic


def line_figure(chart: LineChart) -> Figure:
    """Lines with markers, bands of their spread below them, baselines dashed."""
    extent = _extent(chart)
    bands: list[Figure] = []
    lines: list[Figure] = []
    counts = {True: 0, False: 0}
    for line in chart.lines:
        number = counts[line.is_baseline]
        counts[line.is_baseline] += 1
        colours = BASELINE if line.is_baseline else LINEAR
        colour = colours[number % len(colours)]
        bands += _band(line, colour, chart.log_y, extent[0])
        lines.append(_line(line, number, colour, chart.log_y))
    x = sorted({value for line in chart.lines for value in line.x})
    layout: Figure = {
        "height": 480 + 16 * max(0, len(lines) - 6),
        "xaxis": {"title": {"text": _text(chart.x_label)}, **_x_axis(x, chart.log_x)},
        "yaxis": {"title": {"text": _text(chart.y_label), "standoff": 16}, **_y_axis(extent, chart.log_y)},
        "shapes": [],
        "annotations": [],
    }
    return {"data": [*bands, *lines], "layout": layout}


def num_not_shown(chart: LineChart) -> int:
    """Points that a logarithmic axis has no place for: those at zero or below."""
    return sum(
        (chart.log_y and y is not None and y <= 0) or (chart.log_x and x <= 0)
        for line in chart.lines
        for x, y in zip(line.x, line.y, strict=True)
    )


def heat_figure(heat_map: HeatMap) -> Figure:
    """Cells with their numbers; what cannot exist is grey and says so."""
    x, y = [_text(name) for name in heat_map.x], [_text(name) for name in heat_map.y]
    values = [[None if v is None or not math.isfinite(v) else v for v in row] for row in heat_map.values]
    known = [v for row in values for v in row if v is not None]
    labels = [[shown(v) for v in row] for row in values]
    common = {
        "type": "heatmap",
        "x": x,
        "y": y,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": "%{text}",
        "textfont": {"color": _DARK},
    }
    cells = {
        **common,
        "text": labels,
        **_colours(values, known, heat_map.value_label),
        "hovertemplate": "%{y}<br>%{x}: %{text}<extra></extra>",
    }
    nothing = {
        **common,
        "z": [[1 if v is None else None for v in row] for row in values],
        "text": [[NOT_AVAILABLE if v is None else "" for v in row] for row in values],
        "colorscale": [[0, _NOTHING], [1, _NOTHING]],
        "showscale": False,
        "hovertemplate": "%{y}<br>%{x}: n/a<extra></extra>",
    }
    layout: Figure = {
        "height": 170 + 34 * len(y),
        "xaxis": {"title": {"text": _text(heat_map.x_label)}, "type": "category", "showgrid": False},
        "yaxis": {
            "title": {"text": _text(heat_map.y_label), "standoff": 16},
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
        },
        "shapes": [],
        "annotations": [],
    }
    return {"data": [cells, nothing] if len(known) < len(x) * len(y) else [cells], "layout": layout}


def _line(line: Line, number: int, colour: str, log_y: bool) -> Figure:
    few = len(line.x) <= _FEW
    style: Figure = {"color": colour, "width": 2 if line.is_baseline else 2.5}
    if line.is_baseline:
        style["dash"] = DASHES[number % len(DASHES)]
    return {
        "type": "scatter",
        "mode": "lines+markers" if few and not line.is_baseline else "lines",
        "name": _text(line.name),
        "legendgroup": _text(line.name),
        "x": list(line.x),
        "y": [_drawable(value, log_y) for value in line.y],
        "line": style,
        "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
        "hovertemplate": "%{x:.3~g}: %{y:.3~g}",
    }


def _band(line: Line, colour: str, log_y: bool, bottom: float) -> list[Figure]:
    """The spread as closed outlines, one for every run of points that have one."""
    x: list[float | None] = []
    y: list[float | None] = []
    for run in _runs(line):
        x += [*(p[0] for p in run), *(p[0] for p in reversed(run)), None]
        low = [max(p[1], bottom) if log_y else p[1] for p in run]  # what lies below the axis ends at its foot
        y += [*(p[2] for p in run), *reversed(low), None]
    if not x:
        return []
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "legendgroup": _text(line.name),
            "showlegend": False,
            "hoverinfo": "skip",
            "x": x[:-1],
            "y": y[:-1],
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": f"rgba({red},{green},{blue},0.18)",
        }
    ]


def _runs(line: Line) -> Iterable[list[tuple[float, float, float]]]:
    run: list[tuple[float, float, float]] = []
    for x, low, high in zip(line.x, line.low, line.high, strict=False):
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            if len(run) > 1:
                yield run
            run = []
        else:
            run.append((x, low, high))
    if len(run) > 1:
        yield run


def _extent(chart: LineChart) -> tuple[float, float]:
    """Least and largest value that is drawn, with some air."""
    values = [
        value
        for line in chart.lines
        for value in (*line.y, *line.low, *line.high)
        if value is not None and math.isfinite(value) and (value > 0 or not chart.log_y)
    ]
    if not values:
        return (0.1, 1.0)
    low, high = min(values), max(values)
    if chart.log_y:
        air = max(1.2, (high / low) ** 0.05)
        return low / air, high * air
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - air if low < 0 else max(0.0, low - air)), high + air


def _x_axis(x: Sequence[float], is_log: bool) -> Figure:
    if is_log:
        positive = [value for value in x if value > 0] or [1.0]
        ticks = positive if len(x) <= _FEW else _ticks(positive[0], positive[-1])
        return {"type": "log", "tickvals": ticks, "ticktext": [_tick(value) for value in ticks]}
    if len(x) <= _FEW and all(float(value).is_integer() for value in x) and x and x[-1] - x[0] <= 20:
        return {"dtick": 1}
    return {}


def _y_axis(extent: tuple[float, float], is_log: bool) -> Figure:
    if not is_log:
        return {"range": list(extent), "tickformat": "~g"}
    ticks = _ticks(*extent)
    return {
        "type": "log",
        "range": [math.log10(end) for end in extent],
        "tickvals": ticks,
        "ticktext": [_tick(value) for value in ticks],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: powers of ten, or 1, 2 and 5 times them where these would be few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors, step = ((1, 2, 5), 1) if last - first <= 3 else ((1,), math.ceil((last - first) / 9))
    candidates = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    return [value for value in candidates if low * 0.999 <= value <= high * 1.001]


def _tick(value: float) -> str:
    if float(value).is_integer() and value < 1e6:
        return shown(value)
    if value >= 1e-3:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _colours(values: list[list[float | None]], known: Sequence[float], label: str) -> Figure:
    """Colours by the kind of numbers: around zero, over many powers of ten, or plainly from low to high."""
    lines = textwrap.wrap(label, max(18, 5 * len(values)))  # along the bar, which is as high as the rows
    bar: Figure = {"title": {"text": "<br>".join(map(_text, lines)), "side": "right"}, "thickness": 12}
    if known and min(known) < 0 < max(known):
        end = max(map(abs, known))
        return {"z": values, "zmin": -end, "zmax": end, "colorscale": _DIVERGING, "colorbar": bar}
    if known and min(known) > 0 and max(known) / min(known) >= _WIDE:
        z = [[None if v is None else math.log10(v) for v in row] for row in values]
        ticks = range(math.ceil(math.log10(min(known))), math.floor(math.log10(max(known))) + 1)
        bar |= {"tickvals": list(ticks), "ticktext": [shown(10.0**tick) for tick in ticks]}
        return {"z": z, "colorscale": _SEQUENTIAL, "colorbar": bar}
    return {"z": values, "colorscale": _SEQUENTIAL, "colorbar": {**bar, "tickformat": ".3~g"}}


def _drawable(value: float | None, is_log: bool) -> float | None:
    return value if value is not None and math.isfinite(value) and (value > 0 or not is_log) else None


def _text(text: str) -> str:
    return html.escape(text, quote=False)
