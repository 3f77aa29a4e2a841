"""One picture of the arena: a row per mechanism, a column per task and per measured cost; plain SVG, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..records import ArenaResult, ArenaTaskResult
from .arena_rows import BASELINES, EXACT, Mean, cost_of, ratio, rows_of, unit

_LEFT, _TOP, _ROW, _COLUMN, _GAP, _BELOW, _BOTTOM = 150, 74, 26, 170, 26, 28, 30
_MOST = 5  # columns of a shelf: more, and a page makes the words too small to read
_INK, _SOFT, _LINE, _BAND = "#1d2430", "#5b6573", "#d9dde3", "#eef4fa"
_OWN, _OTHER, _BASE = "#c2410c", "#2f7fc1", "#6b7280"
_OURS = "macformer"


@dataclass(frozen=True)
class _Panel:
    """One column: a value for each mechanism that has one, on an axis of its own."""

    title: str
    subtitle: str
    values: dict[str, Mean]
    level: float | None  # of softmax, a dashed line
    floor: tuple[str, float] | None  # what ignores the sequence, a dotted line
    log: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        found = [x for value in self.values.values() for x in _ends(value)]
        found += [] if self.level is None else [self.level]
        found += [] if self.floor is None else [self.floor[1]]
        low, high = min(found), max(found)
        if self.log:
            return low / 1.15, high * 1.15
        pad = 0.08 * max(high - low, 1.0)
        return low - pad, high + pad

    def share(self, value: float) -> float:
        """Where a value lies on the axis, 0 to 1."""
        low, high = self.bounds
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Few round numbers within the bounds."""
        low, high = self.bounds
        if self.log:
            return _thinned([2.0**n for n in range(-6, 12) if low <= 2.0**n <= high])
        step = 10 ** math.floor(math.log10(max(high - low, 1e-9)))
        step = next(s for s in (step / 5, step / 2, step, 2 * step, 5 * step) if (high - low) / s <= 5)
        first = math.ceil(low / step)
        return [step * n for n in range(first, math.floor(high / step) + 1)]


def render_arena_svg(found: ArenaResult) -> str:
    """Scores of all mechanisms on all tasks, and how many times faster than fused softmax a training step is.

    Args:
        found: what was run. Bars are standard deviations over the seeds.
    """
    panels = [panel for result in found.tasks if (panel := _scores(result)) is not None]
    order = list(dict.fromkeys(run.label for result in found.tasks for run in result.runs))
    panels += [panel for result in found.tasks if (panel := _times(result, order)) is not None]
    # ours first, then what it is compared with, then the others
    labels = [label for label in (_OURS, *BASELINES) if label in order]
    labels += [label for label in order if label not in labels]
    shelves = max(-(-len(panels) // _MOST), 1)
    across = max(-(-len(panels) // shelves), 3)
    tall = _TOP + len(labels) * _ROW + _BELOW
    width, height = _LEFT + across * (_COLUMN + _GAP), shelves * tall + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'style="max-width: 100%; height: auto" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape('Scores and speed of attention mechanisms')}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for shelf in range(shelves):
        parts += _shelf(panels[shelf * across : (shelf + 1) * across], labels, width, shelf * tall + _TOP)
    note = "Mean over seeds, bars: standard deviation. Dashed: softmax. Dotted: what ignores the sequence."
    parts.append(_text(12, height - 12, note, _SOFT, "start", ' font-size="12"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _shelf(panels: Sequence[_Panel], labels: Sequence[str], width: int, top: int) -> list[str]:
    """Columns beside each other, the names of the rows to their left."""
    parts: list[str] = []
    for i, label in enumerate(labels):
        y = top + i * _ROW
        if label == _OURS:
            parts.append(f'<rect x="0" y="{y}" width="{width}" height="{_ROW}" fill="{_BAND}"/>')
        weight = ' font-weight="650"' if label == _OURS else ""
        parts.append(_text(_LEFT - 12, y + _ROW / 2 + 4, label, _colour(label), "end", weight))
    for column, panel in enumerate(panels):
        parts += _drawn(panel, labels, _LEFT + column * (_COLUMN + _GAP), top)
    return parts


def _scores(result: ArenaTaskResult) -> _Panel | None:
    rows = {row.label: row.score for row in rows_of(result) if row.score is not None}
    if not rows:
        return None
    task = result.task
    name = {"accuracy": "accuracy (%)", "bleu": "BLEU"}.get(task.metric, task.metric)
    exact = rows.get(EXACT)
    floor = (task.trivial_name, unit(task.metric) * task.trivial_score) if task.metric != "perplexity" else None
    return _Panel(task.name, f"{name}, {task.length:,} positions", rows, exact.value if exact else None, floor)


def _times(result: ArenaTaskResult, labels: Sequence[str]) -> _Panel | None:
    length = result.task.full_length
    exact = cost_of(result, EXACT, length)
    found: dict[str, Mean] = {}
    for label in labels:
        cost = cost_of(result, label, length)
        times = ratio(cost.latency_ms, exact.latency_ms) if cost is not None and exact is not None else None
        if times is not None:
            found[label] = Mean(times, None, times, times, 1)
    if not found:
        return None
    return _Panel(f"{result.task.name}, step", f"times faster, {length:,} positions", found, 1.0, None, True)


def _drawn(panel: _Panel, labels: Sequence[str], left: float, top: int) -> list[str]:
    bottom = top + len(labels) * _ROW

    def x(value: float) -> float:
        return left + panel.share(value) * _COLUMN

    parts = [
        _text(left, top - 34, panel.title, _INK, "start", ' font-weight="650"'),
        _text(left, top - 16, panel.subtitle, _SOFT, "start"),
    ]
    for tick in panel.ticks():
        parts.append(_line(x(tick), top, x(tick), bottom, _LINE))
        parts.append(_text(x(tick), bottom + 17, f"{tick:g}", _SOFT, "middle"))
    for value, dashes in ((panel.level, "5 4"), (panel.floor[1] if panel.floor else None, "1 4")):
        if value is not None:
            parts.append(_line(x(value), top, x(value), bottom, _SOFT, f' stroke-dasharray="{dashes}"'))
    for i, label in enumerate(labels):
        y = top + (i + 0.5) * _ROW
        value = panel.values.get(label)
        if value is None:
            parts.append(_text(left + _COLUMN / 2, y + 4, "–", _SOFT, "middle"))
            continue
        low, high = _ends(value)
        if high > low:
            parts.append(_line(x(low), y, x(high), y, _colour(label), ' stroke-width="2"'))
        parts.append(f'<circle cx="{x(value.value):.1f}" cy="{y:.1f}" r="5" fill="{_colour(label)}"/>')
    return parts


def _ends(value: Mean) -> tuple[float, float]:
    spread = value.spread or 0.0
    return value.value - spread, value.value + spread


def _thinned(ticks: list[float]) -> list[float]:
    return ticks if len(ticks) <= 5 else ticks[:: math.ceil(len(ticks) / 5)]


def _colour(label: str) -> str:
    return _OWN if label == _OURS else _BASE if label in BASELINES else _OTHER


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
