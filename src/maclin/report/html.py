"""A report as one HTML page that opens without a network."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..records import Report
from .charts import charts
from .sections import DECISIONS, GLOSSARY, headlines, sections, warnings


def render_html(report: Report) -> str:
    """The report as one self-contained page: styles, scripts and data inline, nothing loaded from elsewhere.

    Args:
        report: what was found. All of its text is escaped.
    """
    template = environment().get_template("report.html.j2")
    return template.render(
        report=report,
        verdict=report.verdict,
        decision=DECISIONS.get(report.verdict.decision, report.verdict.decision),
        headlines=headlines(report),
        sections=sections(report),
        warnings=warnings(report),
        charts=charts(report),
        glossary=GLOSSARY,
        plotly=plotly_js(),
    )


@cache
def environment() -> Environment:
    """Templates of the pages, in which every text is escaped."""
    return Environment(
        loader=PackageLoader("maclin.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def plotly_js() -> Markup:
    """The script that draws the charts, to be put into a page."""
    from plotly.offline import get_plotlyjs  # read only where a page is made

    return Markup(get_plotlyjs())
