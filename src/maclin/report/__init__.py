"""Report: records -> HTML, Markdown, JSON; the verdict, the rollout, and the return on investment.

What a proof of concept measured comes in as records and leaves as something to sign, or not to sign. Nothing
here measures, and nothing here needs torch. The schema, the rule and the formulas are in ``docs/report.md``.
"""

from __future__ import annotations

from .files import NAMES, check_out_dir, load_report, write_report
from .html import render_html
from .lengths import read_lengths
from .markdown import render_markdown
from .roi import roi, roi_columns, roi_dict, roi_markdown, roi_rows
from .rollout import rollout_stages
from .verdict import RULE, decide, point_to_time

__all__ = [
    "NAMES",
    "RULE",
    "check_out_dir",
    "decide",
    "load_report",
    "point_to_time",
    "read_lengths",
    "render_html",
    "render_markdown",
    "roi",
    "roi_columns",
    "roi_dict",
    "roi_markdown",
    "roi_rows",
    "rollout_stages",
    "write_report",
]
