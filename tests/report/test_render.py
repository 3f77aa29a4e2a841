from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from maclin.records import Report, Timing
from maclin.report import render_html, render_markdown
from maclin.report.charts import charts
from maclin.report.sections import sections

KINDS = ["go", "go-after-healing", "no-go"]
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.open = "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render_html(report))


def test_the_page_is_well_formed_and_its_tables_have_headers(page: Page) -> None:
    assert page.open == []
    tables = [tag for tag, _ in page.tags].count("table")
    assert tables > 10
    assert [tag for tag, _ in page.tags].count("caption") == tables
    assert [attrs.get("scope") for tag, attrs in page.tags if tag == "th"].count("col") > tables
    assert all(attrs.get("aria-label") for _, attrs in page.tags if "data-chart" in attrs)


def test_the_page_loads_nothing_from_elsewhere(page: Page) -> None:
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    policy = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert "default-src 'none'" in (policy[0] or "")
    assert "http" not in (policy[0] or "")
    own = page.scripts[-1]
    assert not re.search(r"https?:|import\(|fetch\(", own)


def test_text_is_escaped(report: Report) -> None:
    evil = "</script><script>alert(1)</script><img src=http://x onerror=y>"
    audit = dataclasses.replace(
        report.audit, layers=(dataclasses.replace(report.audit.layers[0], layer=evil), *report.audit.layers[1:])
    )
    timing = Timing(evil, "attention", 128, 1.0)
    page = Page(
        render_html(
            dataclasses.replace(
                report,
                audit=audit,
                timings=(*report.timings, timing),
                data=dataclasses.replace(report.data, source=evil, warnings=(evil,)),
                model=dataclasses.replace(report.model, name=evil),
            )
        )
    )
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 4


def test_names_with_markup_survive_in_both_renderings(report: Report, page: Page) -> None:
    assert "notes <draft> & memos.jsonl" in page.text
    assert "notes &lt;draft> &amp; memos.jsonl" in render_markdown(report)


@pytest.mark.parametrize("kind", KINDS)
def test_both_renderings_hold_every_layer_mechanism_section_and_the_verdict(make_report, kind: str) -> None:
    report = make_report(kind)
    markdown, text = render_markdown(report), Page(render_html(report)).text
    wanted = [layer.layer for layer in report.audit.layers]
    wanted += [error.mechanism for layer in report.audit.layers for error in layer.errors]
    wanted += [section.title for section in sections(report)]
    wanted += [report.verdict.decision, *report.warnings, *report.data.warnings, "uniform", "softmax"]
    wanted += [stage.name for stage in report.rollout]
    for word in wanted:
        assert word in markdown
        assert word in text or word == report.verdict.decision
    assert report.verdict.reason in markdown
    assert report.verdict.reason in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_markdown_table_has_the_columns_of_its_header(make_report, kind: str) -> None:
    for block in render_markdown(make_report(kind)).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_charts_are_figures_that_plotly_accepts(make_report, kind: str) -> None:
    report = make_report(kind)
    found = charts(report)
    assert set(found) == {
        "frontier", "latency-attention", "latency-model", "memory-attention", "memory-model", "audit",
    }  # fmt: skip
    for figure in found.values():
        go.Figure(figure)
        json.dumps(figure, allow_nan=False)
    assert found["latency-model"]["data"][0]["name"] == "original"
    assert found["audit"]["data"][0]["x"][0] == "uniform"
    assert found["audit"]["data"][0]["z"][2][-1] is None  # could not be applied there


def test_uniform_stands_beside_every_error_and_worse_is_marked(report: Report) -> None:
    audit = next(section for section in sections(report) if section.key == "audit")
    table = audit.tables[0]
    assert table.columns[1].startswith("uniform")
    column = table.columns.index("positive")
    assert table.rows[0][column].startswith("* ")
    assert any("radius 41 is beyond its domain" in note for note in table.notes)


def test_the_same_mechanism_with_two_configurations_gets_two_columns(report: Report) -> None:
    layer = report.audit.layers[0]
    other = dataclasses.replace(layer.errors[1], config={"proj_len": 128}, rel_error=0.25)
    audit = dataclasses.replace(
        report.audit, layers=(dataclasses.replace(layer, errors=(*layer.errors, other)), *report.audit.layers[1:])
    )
    markdown = render_markdown(dataclasses.replace(report, audit=audit))
    assert "linformer (proj_len=128)" in markdown
    assert "linformer (proj_len=64, projection=mean)" in markdown


def test_a_report_of_a_model_that_cannot_be_converted_still_reads(report: Report) -> None:
    layers = tuple(
        dataclasses.replace(
            layer, heads=(), errors=(), uniform_rel_error=None, uniform_rel_error_by_head=(), refused="packed sequences"
        )
        for layer in report.audit.layers
    )
    bare = dataclasses.replace(
        report,
        audit=dataclasses.replace(report.audit, layers=layers),
        frontier=(),
        timings=(),
        break_even=(),
        plan=dataclasses.replace(report.plan, rows=()),
        data=dataclasses.replace(report.data, document_tokens=()),
    )
    markdown = render_markdown(bare)
    assert "packed sequences" in markdown
    assert "No example: wanted measured latencies" in markdown
    assert Page(render_html(bare)).open == []
