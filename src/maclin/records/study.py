"""What one of the papers' experiments found: tables, charts, measurements."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import Config, Environment
from .text import Cell


@dataclass(frozen=True)
class StudyTable:
    """A table of a study, rows in the order of reading."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``low`` and ``high`` are the spread over seeds, empty where there is none."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    is_baseline: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Numbers over two axes of categories: values[i][j] stands at y[i], x[j]; None is shown as n/a."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Study:
    """What one of the papers' experiments found; ``study.json`` is this record.

    ``measurements`` holds every measured cell as it was measured; tables and charts are drawn from it.
    """

    schema_version: str
    name: str  # "projection", "approximation", "ppsbn", "theory"
    question: str
    findings: tuple[str, ...]  # sentences, the answer first
    settings: Config
    environment: Environment
    measurements: tuple[Config, ...]
    tables: tuple[StudyTable, ...] = ()
    charts: tuple[LineChart, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each step
