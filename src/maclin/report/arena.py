"""The tables of the arena as HTML, Markdown and JSON, and one picture of them; on disk and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..records import ArenaResult, LineChart, to_json
from .arena_charts import learning_curves
from .arena_findings import QUESTION, findings_of
from .arena_picture import render_arena_svg
from .arena_tables import conditions_table, cost_tables, overview_table, score_table
from .charts import Figure
from .files import check_out_dir, load_record, write_texts
from .html import environment, plotly_js
from .markdown import plain, table_lines
from .study_charts import line_figure
from .study_text import chart_table
from .tables import Table

ARENA_NAMES = ("arena.html", "arena.md", "arena.json", "arena.svg")
"""The files that ``write_arena`` makes."""


@dataclass(frozen=True)
class _Drawing:
    """A chart of the page, and its numbers."""

    key: str
    chart: LineChart
    figure: Figure
    table: Table


def render_arena_html(found: ArenaResult) -> str:
    """The tables as one self-contained page, as ``render_html`` makes that of a report.

    Args:
        found: what was run. All of its text is escaped.
    """
    drawings = _drawings(found)
    return (
        environment()
        .get_template("arena.html.j2")
        .render(
            found=found,
            question=QUESTION,
            findings=findings_of(found),
            picture=render_arena_svg(found),
            tables=_tables(found),
            drawings=drawings,
            conditions=conditions_table(found),
            charts={drawing.key: drawing.figure for drawing in drawings},
            plotly=plotly_js(),
        )
    )


def render_arena_markdown(found: ArenaResult) -> str:
    """The tables as Markdown text; learning curves as tables of their numbers.

    Args:
        found: what was run.
    """
    lines = [f"# {plain(QUESTION)}", "", *(f"- {plain(sentence)}" for sentence in findings_of(found))]
    if found.warnings:
        lines += ["", "Read with care:", "", *(f"- {plain(text)}" for text in found.warnings)]
    for title, tables in (
        ("Tables", _tables(found)),
        ("Learning curves", [drawing.table for drawing in _drawings(found)]),
    ):
        if tables:
            lines += ["", f"## {title}"]
        for table in tables:
            lines += ["", f"### {plain(table.title)}", "", *table_lines(table)]
    return "\n".join([*lines, "", "## How it was measured", "", *table_lines(conditions_table(found))]) + "\n"


def write_arena(found: ArenaResult, out_dir: str | Path) -> dict[str, Path]:
    """Write ``arena.html``, ``arena.md``, ``arena.json`` and ``arena.svg``, replacing earlier ones.

    Args:
        found: what was run.
        out_dir: directory, commonly that of the runs; made if it is not there.

    Returns:
        The paths by the keys ``html``, ``md``, ``json`` and ``svg``.

    Raises:
        NotADirectoryError, PermissionError: as ``check_out_dir``.
        OSError: no space left, or another failure of the disk; one sentence.
    """
    rendered = (render_arena_html(found), render_arena_markdown(found), to_json(found), render_arena_svg(found))
    checked = check_out_dir(out_dir, force=True, names=ARENA_NAMES, noun="tables")
    return write_texts(dict(zip(ARENA_NAMES, rendered, strict=True)), checked, noun="tables")


def load_arena(path: str | Path) -> ArenaResult:
    """Read an ``arena.json`` back.

    Args:
        path: the file.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it cannot be read.
        ValueError: not JSON, not tables of the arena, or of another schema.
    """
    return load_record(ArenaResult, path, noun="arena")


def _tables(found: ArenaResult) -> list[Table]:
    overview = overview_table(found)
    tables = [] if overview is None else [overview]
    for result in found.tasks:
        tables += [score_table(result), *cost_tables(result)]
    return tables


def _drawings(found: ArenaResult) -> list[_Drawing]:
    curves = [chart for result in found.tasks for chart in learning_curves(result)]
    return [_Drawing(f"curve-{i}", chart, line_figure(chart), chart_table(chart)) for i, chart in enumerate(curves)]
