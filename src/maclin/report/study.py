"""A study as HTML, Markdown and JSON, on disk and back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..records import Study, to_json
from .charts import Figure
from .files import check_out_dir, load_record, write_texts
from .html import environment, plotly_js
from .markdown import plain, table_lines
from .study_charts import heat_figure, line_figure, num_not_shown
from .study_text import chart_table, conditions_table, heat_map_table, study_table
from .tables import Table

STUDY_NAMES = ("study.html", "study.md", "study.json")
"""The files that ``write_study`` makes."""
JOURNAL_NAME = "measurements.jsonl"
"""What an unfinished study has measured, in the same directory."""


@dataclass(frozen=True)
class _Drawing:
    """A chart or heat map of the page, and its numbers."""

    key: str
    title: str
    notes: tuple[str, ...]
    figure: Figure
    table: Table


def render_study_html(study: Study) -> str:
    """The study as one self-contained page, as ``render_html`` makes that of a report.

    Args:
        study: what was found. All of its text is escaped.
    """
    drawings = _drawings(study)
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            study=study,
            drawings=drawings,
            tables=[study_table(table) for table in study.tables],
            conditions=conditions_table(study),
            charts={drawing.key: drawing.figure for drawing in drawings},
            plotly=plotly_js(),
        )
    )


def render_study_markdown(study: Study) -> str:
    """The study as Markdown text; charts and heat maps as tables of their numbers.

    Args:
        study: what was found.
    """
    lines = [f"# {plain(study.question)}", "", *(f"- {plain(sentence)}" for sentence in study.findings)]
    if study.warnings:
        lines += ["", "Read with care:", "", *(f"- {plain(text)}" for text in study.warnings)]
    for title, tables in (
        ("Charts", [drawing.table for drawing in _drawings(study)]),
        ("Tables", [study_table(table) for table in study.tables]),
    ):
        if tables:
            lines += ["", f"## {title}"]
        for table in tables:
            lines += ["", f"### {plain(table.title)}", "", *table_lines(table)]
    return "\n".join([*lines, "", "## How it was measured", "", *table_lines(conditions_table(study))]) + "\n"


def check_study_dir(out_dir: str | Path, name: str, force: bool = False) -> Path:
    """Whether a study can be written there; a directory with what an interrupted one has measured is welcome.

    Args:
        out_dir: directory of the study; it may not exist yet.
        name: of the study.
        force: whether an earlier study, or the measurements of another one, may be replaced.

    Returns:
        The directory as a path.

    Raises:
        FileExistsError: a finished study is there, or the measurements of another one, and ``force`` is False.
        NotADirectoryError, PermissionError: as ``check_out_dir``.
    """
    out_dir = check_out_dir(out_dir, force, names=STUDY_NAMES, noun="study")
    journal = out_dir / JOURNAL_NAME
    if journal.is_dir():
        raise FileExistsError(f"wanted to write {journal}, which is a directory; choose another directory")
    other = journal_study(journal)
    if other not in (None, name) and not force:
        raise FileExistsError(
            f"{journal} holds measurements of the study {other!r}, not {name!r}; choose another directory, or pass "
            "--force to replace them"
        )
    return out_dir


def journal_study(path: Path) -> str | None:
    """The name of the study whose measurements a journal holds, from its first line; None where it says nothing."""
    if not os.path.lexists(path):
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        name = json.loads(first)["key"]["study"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def write_study(study: Study, out_dir: str | Path, force: bool = False) -> dict[str, Path]:
    """Write ``study.html``, ``study.md`` and ``study.json``: all three, or none; see ``write_report``.

    Args:
        study: what was found.
        out_dir: directory; made if it is not there.
        force: replace an earlier study.

    Returns:
        The paths by the keys ``html``, ``md`` and ``json``.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: as ``check_study_dir``.
        OSError: no space left, or another failure of the disk; one sentence.
    """
    rendered = (render_study_html(study), render_study_markdown(study), to_json(study))
    checked = check_study_dir(out_dir, study.name, force)
    return write_texts(dict(zip(STUDY_NAMES, rendered, strict=True)), checked, noun="study")


def load_study(path: str | Path) -> Study:
    """Read a ``study.json`` back.

    Args:
        path: the file.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it cannot be read.
        ValueError: not JSON, not a study, or a study of another schema.
    """
    return load_record(Study, path, noun="study")


def _drawings(study: Study) -> list[_Drawing]:
    found = []
    for i, chart in enumerate(study.charts):
        lost = num_not_shown(chart)
        notes = [chart.note] if chart.note else []
        if lost:
            notes.append(f"{lost} of the points are zero or below, for which a logarithmic axis has no place.")
        found.append(_Drawing(f"line-{i}", chart.title, tuple(notes), line_figure(chart), chart_table(chart)))
    for i, heat_map in enumerate(study.heat_maps):
        notes = (heat_map.note,) if heat_map.note else ()
        figure = heat_figure(heat_map)
        found.append(_Drawing(f"heat-{i}", heat_map.title, notes, figure, heat_map_table(heat_map)))
    return found
