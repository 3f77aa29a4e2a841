"""Report: records -> HTML, Markdown, JSON; the verdict, the rollout, and the return on investment.

What a proof of concept or a study measured comes in as records and leaves as something to sign, or not to sign. Nothing
here measures, and nothing here needs torch. The schema, the rule and the formulas are in ``docs/report.md``.
"""

from __future__ import annotations

from .bench import (
    bench_names,
    check_bench_dir,
    load_bench,
    render_bench_html,
    render_bench_markdown,
    render_comparison,
    write_bench,
)
from .files import NAMES, check_out_dir, load_report, write_report
from .heal import HEAL_NAMES, heal_study, load_heal, render_heal_html, render_heal_markdown, write_heal
from .html import render_html
from .lengths import read_lengths
from .markdown import render_markdown
from .roi import roi, roi_columns, roi_dict, roi_markdown, roi_rows
from .rollout import rollout_stages
from .study import (
    JOURNAL_NAME,
    STUDY_NAMES,
    check_study_dir,
    journal_study,
    load_study,
    render_study_html,
    render_study_markdown,
    write_study,
)
from .verdict import RULE, decide, point_to_time

__all__ = [
    "HEAL_NAMES",
    "JOURNAL_NAME",
    "NAMES",
    "RULE",
    "STUDY_NAMES",
    "bench_names",
    "check_bench_dir",
    "check_out_dir",
    "check_study_dir",
    "decide",
    "heal_study",
    "journal_study",
    "load_bench",
    "load_heal",
    "load_report",
    "load_study",
    "point_to_time",
    "read_lengths",
    "render_bench_html",
    "render_bench_markdown",
    "render_comparison",
    "render_heal_html",
    "render_heal_markdown",
    "render_html",
    "render_markdown",
    "render_study_html",
    "render_study_markdown",
    "roi",
    "roi_columns",
    "roi_dict",
    "roi_markdown",
    "roi_rows",
    "rollout_stages",
    "write_bench",
    "write_heal",
    "write_report",
    "write_study",
]
