"""A report as Markdown: the content of the page, without its charts."""

from __future__ import annotations

from ..records import Report
from .sections import DECISIONS, GLOSSARY, headlines, sections, warnings
from .tables import Table


def render_markdown(report: Report) -> str:
    """The report as Markdown text, tables aligned so that they also read well unrendered.

    Args:
        report: what was found.
    """
    verdict = report.verdict
    lines = [f"# Linear attention for {plain(report.model.name)}", ""]
    lines += [f"**{DECISIONS.get(verdict.decision, verdict.decision)}** (`{verdict.decision}`)", ""]
    lines += [plain(verdict.reason), ""]
    lines += [f"- {item.label}: **{item.value}** ({plain(item.note)})" for item in headlines(report)]
    if warnings(report):
        lines += ["", "Read with care:", "", *(f"- {plain(text)}" for text in warnings(report))]
    for section in sections(report):
        lines += ["", f"## {section.title}", "", plain(section.lead)]
        if section.command:
            lines += ["", f"    {section.command}"]
        for table in section.tables:
            lines += ["", f"### {plain(table.title)}", "", *table_lines(table)]
        if section.items:
            lines += ["", *(f"- {plain(item)}" for item in section.items)]
    lines += ["", "## Glossary", "", *(f"- **{term}**: {meaning}" for term, meaning in GLOSSARY)]
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> list[str]:
    """The lines of a table and of its notes."""
    if not table.rows:
        return ["Nothing to show."]
    rows = [[_cell(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if i < table.num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if i < table.num_text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    notes = ["", *(f"{plain(note)}  " for note in table.notes)] if table.notes else []
    return [line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:]), *notes]


def plain(text: str) -> str:
    """One line in which no character starts HTML, emphasis or a list by accident."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return flat.replace("*", "\\*").replace("`", "\\`")


def _cell(text: str) -> str:
    return plain(text).replace("|", "\\|")
