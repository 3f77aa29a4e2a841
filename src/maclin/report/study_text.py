"""The words and tables of a study, for every rendering the same."""

from __future__ import annotations

import json
import math

from ..records import Cell, HeatMap, Line, LineChart, Study, StudyTable
from . import words
from .sections import environment_rows
from .tables import Table

NOT_AVAILABLE = "n/a"
"""What stands where a value cannot exist."""


def shown(value: Cell) -> str:
    """A cell as people read it: words as they are, whole numbers in full, others with three significant figures.

    ``0.0123``, ``12.3``, ``12,300``, ``1.23e-5``; ``n/a`` for None and for what is not finite.
    """
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    rounded = float(f"{value:.3g}")
    if 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def study_table(table: StudyTable) -> Table:
    """A table of the study; the columns up to the first number are words."""
    rows = tuple(tuple(shown(cell) for cell in row) for row in table.rows)
    numbers = (
        any(isinstance(row[i], int | float) for row in table.rows) or all(row[i] is None for row in table.rows)
        for i in range(len(table.columns))
    )
    text_columns = next((i for i, is_number in enumerate(numbers) if is_number), len(table.columns))
    return Table(table.title, table.columns, rows, _notes(table.note), text_columns)


def chart_table(chart: LineChart) -> Table:
    """The numbers of a chart: x down, lines across, the spread in brackets."""
    x = sorted({value for line in chart.lines for value in line.x})
    points = [_points(line) for line in chart.lines]
    columns = (chart.x_label, *(f"{line.name} (baseline)" if line.is_baseline else line.name for line in chart.lines))
    rows = tuple((shown(value), *(found.get(value, "") for found in points)) for value in x)
    title = f"{chart.title}: {chart.y_label}"
    return Table(title, columns, rows, _notes(chart.note), 0, collapsed=True)


def heat_map_table(heat_map: HeatMap) -> Table:
    """The numbers of a heat map, as it stands."""
    columns = (f"{heat_map.y_label} \\ {heat_map.x_label}", *heat_map.x)
    rows = tuple((y, *map(shown, row)) for y, row in zip(heat_map.y, heat_map.values, strict=True))
    return Table(f"{heat_map.title}: {heat_map.value_label}", columns, rows, _notes(heat_map.note), 1, collapsed=True)


def conditions_table(study: Study) -> Table:
    """Settings, machine and times."""
    settings = (
        (name, value if isinstance(value, str) else json.dumps(value)) for name, value in study.settings.items()
    )
    rows = (
        *((f"Setting {name}", value) for name, value in settings),
        *environment_rows(study.environment),
        ("Measurements", f"{words.count(len(study.measurements))}, all of them in study.json"),
        *((f"Time to {name}", f"{seconds:.1f} s") for name, seconds in study.seconds.items()),
    )
    return Table("Conditions", ("What", "Value"), rows, (), 2)


def _points(line: Line) -> dict[float, str]:
    low = line.low or (None,) * len(line.x)
    high = line.high or (None,) * len(line.x)
    return {
        x: shown(y) if a is None or b is None or y is None else f"{shown(y)} ({shown(a)} to {shown(b)})"
        for x, y, a, b in zip(line.x, line.y, low, high, strict=True)
    }


def _notes(note: str) -> tuple[str, ...]:
    return (note,) if note else ()
