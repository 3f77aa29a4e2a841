"""A result of ``maclin bench`` as HTML, Markdown and JSON, on disk and back."""

from __future__ import annotations

from pathlib import Path

from ..records import BenchResult, Comparison, Environment, to_json
from .bench_charts import bench_drawings
from .bench_tables import (
    bench_findings,
    bench_title,
    break_even_table,
    change_table,
    growth_table,
    method_table,
    rows_table,
)
from .files import check_out_dir, load_record, write_texts
from .html import environment, plotly_js
from .markdown import plain, table_lines
from .tables import Table


def bench_names(what: str, settings: dict[str, object], where: Environment) -> tuple[str, str, str]:
    """The files of a result: kind, what is special about it, date and hardware; HTML, Markdown, JSON."""
    parts = [f"bench-{what}"]
    if settings.get("causal") and what != "decode":
        parts.append("causal")
    if settings.get("backward"):
        parts.append("backward")
    if where.dtype != "float32":
        parts.append(where.dtype)
    stem = where.stem("-".join(parts))
    return f"{stem}.html", f"{stem}.md", f"{stem}.json"


def render_bench_html(result: BenchResult) -> str:
    """The result as one self-contained page, as ``render_html`` makes that of a report.

    Args:
        result: what was measured. All of its text is escaped.
    """
    drawings = bench_drawings(result)
    return (
        environment()
        .get_template("bench.html.j2")
        .render(
            result=result,
            title=bench_title(result),
            findings=bench_findings(result),
            drawings=drawings,
            tables=_tables(result),
            conditions=method_table(result),
            charts={drawing.key: drawing.figure for drawing in drawings},
            plotly=plotly_js(),
        )
    )


def render_bench_markdown(result: BenchResult) -> str:
    """The result as Markdown text, without its charts.

    Args:
        result: what was measured.
    """
    lines = [f"# {plain(bench_title(result))}", "", *(f"- {plain(text)}" for text in bench_findings(result))]
    if result.warnings:
        lines += ["", "Read with care:", "", *(f"- {plain(text)}" for text in result.warnings)]
    for table in _tables(result):
        lines += ["", f"## {plain(table.title)}", "", *table_lines(table)]
    return "\n".join([*lines, "", "## How it was measured", "", *table_lines(method_table(result))]) + "\n"


def render_comparison(comparison: Comparison) -> str:
    """Two results as Markdown text: what regressed first, then what improved, then the rest.

    Args:
        comparison: of the two.
    """
    regressed = len(comparison.regressed)
    verdict = f"{regressed} of {len(comparison.changes)} figures regressed" if regressed else "nothing regressed"
    head = (
        f"{comparison.what}: {comparison.before.date_utc} against {comparison.after.date_utc}; {verdict} "
        f"by more than {100 * comparison.threshold:g} % and more than the noise"
    )
    lines = [head, "", *(f"! {plain(text)}" for text in comparison.warnings)]
    return "\n".join([*lines, "", *table_lines(change_table(comparison))]) + "\n"


def check_bench_dir(out_dir: str | Path, names: tuple[str, str, str], force: bool = False) -> Path:
    """Whether a result can be written there; raises as ``check_out_dir``."""
    return check_out_dir(out_dir, force, names=names, noun="result")


def write_bench(result: BenchResult, out_dir: str | Path, force: bool = False) -> dict[str, Path]:
    """Write HTML, Markdown and JSON, named by date and hardware: all three, or none; see ``write_report``.

    Args:
        result: what was measured.
        out_dir: directory; made if it is not there.
        force: replace a result of the same kind, day and hardware.

    Returns:
        The paths by the keys ``html``, ``md`` and ``json``.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, OSError: as ``write_report``.
    """
    names = bench_names(result.what, result.settings, result.environment)
    texts = render_bench_html(result), render_bench_markdown(result), to_json(result)
    checked = check_bench_dir(out_dir, names, force)
    return write_texts(dict(zip(names, texts, strict=True)), checked, noun="result")


def load_bench(path: str | Path) -> BenchResult:
    """Read the JSON of a result back.

    Args:
        path: the file; or a directory with exactly one such file.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it cannot be read.
        ValueError: not JSON, not a result, or a result of another schema.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("bench-*.json"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise IsADirectoryError(f"wanted the JSON of one result, got the directory {path}; it holds {names}")
        path = found[0]
    return load_record(BenchResult, path, noun="result")


def _tables(result: BenchResult) -> list[Table]:
    tables = [rows_table(result), growth_table(result), break_even_table(result)]
    return [table for table in tables if table.rows]
