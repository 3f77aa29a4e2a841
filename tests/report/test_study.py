"""Studies as pages, text and files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

from maclin.records import (
    SCHEMA_VERSION,
    Environment,
    HeatMap,
    Line,
    LineChart,
    Study,
    StudyTable,
    to_json,
)
from maclin.report import (
    JOURNAL_NAME,
    STUDY_NAMES,
    check_study_dir,
    journal_study,
    load_study,
    render_study_html,
    render_study_markdown,
    write_study,
)
from maclin.report.study_charts import heat_figure, line_figure, num_not_shown
from maclin.report.study_text import chart_table, shown, study_table

from .test_render import Page

CHART = LineChart(
    "Error over features",
    "features M",
    "relative error",
    (
        Line("published", (32.0, 128.0, 512.0), (0.2, 0.1, 0.05), (0.15, 0.0, 0.04), (0.25, 0.12, 0.06)),
        Line("gap", (32.0, 128.0, 512.0), (0.3, None, 0.07)),
        Line("uniform", (32.0, 512.0), (0.5, 0.5), is_baseline=True),
        Line("mean", (32.0, 512.0), (0.6, 0.6), is_baseline=True),
    ),
    log_x=True,
    log_y=True,
    note="Three seeds.",
)
HEAT = HeatMap("Errors", "kernel", "length", "rel. error", ("exp", "inv"), ("128", "256"), ((0.1, None), (0.004, 0.5)))


@pytest.fixture
def study() -> Study:
    return Study(
        schema_version=SCHEMA_VERSION,
        name="theory",
        question="Is it so?",
        findings=("It is, in 3 of 4 cases.", "The rest is < 1 & a|b."),
        settings={"features": [32, 128], "label": "x"},
        environment=Environment(
            "2026-01-02T03", "0.1", "3.11", "2.13", None, "linux", "a processor", "cpu", 2, "float64"
        ),
        measurements=({"seed": 0, "error": 0.25},),
        tables=(
            StudyTable("Table of <errors>", ("kernel", "M", "error"), (("exp", 16384, 0.012345), ("inv", 8, None))),
        ),
        charts=(CHART,),
        heat_maps=(HEAT,),
        warnings=("Only one seed.",),
        seconds={"measure": 1.25},
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (math.nan, "n/a"),
        (math.inf, "n/a"),
        ("words", "words"),
        (0, "0"),
        (128, "128"),
        (16384.0, "16,384"),
        (-3.0, "-3"),
        (0.0123456, "0.0123"),
        (0.99951, "1.00"),
        (12.3456, "12.3"),
        (-1234.5, "-1,230"),
        (99999.5, "1.00e5"),
        (0.00099951, "0.00100"),
        (0.0009994, "9.99e-4"),
        (1.234e-9, "1.23e-9"),
        (5.6e18, "5.60e18"),
    ],
)
def test_numbers_have_three_significant_figures(value: float | str | None, text: str) -> None:
    assert shown(value) == text


def test_columns_up_to_the_first_number_are_words() -> None:
    table = study_table(StudyTable("t", ("a", "b", "c", "d"), (("x", "y", 1.0, "z"), ("x", "y", None, "z")), "note"))
    assert table.num_text_columns == 2
    assert table.rows == (("x", "y", "1", "z"), ("x", "y", "n/a", "z"))
    assert table.notes == ("note",)
    assert study_table(StudyTable("t", ("a", "b"), (("x", None),))).num_text_columns == 1
    assert study_table(StudyTable("t", ("a",), (("x",),))).num_text_columns == 1


def test_the_numbers_of_a_chart_stand_in_a_table() -> None:
    table = chart_table(CHART)
    assert table.columns == ("features M", "published", "gap", "uniform (baseline)", "mean (baseline)")
    assert table.rows[1] == ("128", "0.100 (0 to 0.120)", "n/a", "", "")
    assert table.rows[2] == ("512", "0.0500 (0.0400 to 0.0600)", "0.0700", "0.500", "0.600")


def test_lines_baselines_and_bands_are_told_apart() -> None:
    figure = line_figure(CHART)
    go.Figure(figure)
    json.dumps(figure, allow_nan=False)
    by_name = {trace["name"]: trace for trace in figure["data"] if "name" in trace}
    assert list(by_name) == ["published", "gap", "uniform", "mean"]
    assert all(by_name[name]["line"]["dash"] for name in ("uniform", "mean"))
    assert by_name["uniform"]["line"] != by_name["mean"]["line"]
    assert "dash" not in by_name["published"]["line"]
    assert by_name["gap"]["y"] == [0.3, None, 0.07]
    bands = [trace for trace in figure["data"] if trace.get("fill") == "toself"]
    assert len(bands) == 1
    assert bands[0]["x"] == [32, 128, 512, 512, 128, 32]
    assert bands[0]["y"][:3] == [0.25, 0.12, 0.06]
    assert bands[0]["legendgroup"] == "published"
    bottom = 10 ** figure["layout"]["yaxis"]["range"][0]
    assert bands[0]["y"][3:] == [0.04, pytest.approx(bottom), 0.15]  # zero has no place: to the foot of the axis
    assert figure["layout"]["xaxis"]["title"]["text"] == "features M"
    assert figure["layout"]["yaxis"]["title"]["text"] == "relative error"
    assert figure["layout"]["xaxis"]["ticktext"] == ["32", "128", "512"]


def test_a_band_is_broken_where_the_spread_is_not_known() -> None:
    line = Line("a", (1.0, 2.0, 3.0, 4.0, 5.0), (1.0,) * 5, (0.5, 0.5, None, 0.5, 0.5), (2.0, 2.0, 2.0, 2.0, 2.0))
    figure = line_figure(LineChart("t", "x", "y", (line,)))
    assert figure["data"][0]["x"] == [1, 2, 2, 1, None, 4, 5, 5, 4]
    assert figure["layout"]["yaxis"]["range"][0] >= 0


def test_every_drawn_value_lies_on_the_axis() -> None:
    for log_y in (True, False):
        figure = line_figure(dataclasses.replace(CHART, log_y=log_y))
        low, high = figure["layout"]["yaxis"]["range"]
        low, high = (10**low, 10**high) if log_y else (low, high)
        drawn = [value for trace in figure["data"] for value in trace["y"] if value is not None]
        assert low <= min(drawn) * (1 + 1e-12)
        assert max(drawn) <= high


def test_points_that_a_logarithmic_axis_cannot_show_are_counted(study: Study) -> None:
    line = Line("a", (1.0, 2.0, 3.0), (0.0, -1.0, 1.0))
    chart = LineChart("t", "x", "y", (line,), log_y=True)
    assert num_not_shown(chart) == 2
    assert num_not_shown(dataclasses.replace(chart, log_y=False)) == 0
    assert line_figure(chart)["data"][-1]["y"] == [None, None, 1.0]
    page = Page(render_study_html(dataclasses.replace(study, charts=(chart,))))
    assert "2 of the points are zero or below" in page.text


def test_cells_of_a_heat_map_hold_their_numbers_and_what_is_not_available() -> None:
    figure = heat_figure(HEAT)
    go.Figure(figure)
    json.dumps(figure, allow_nan=False)
    cells, nothing = figure["data"]
    assert cells["text"] == [["0.100", "n/a"], ["0.00400", "0.500"]]
    assert cells["z"][0][1] is None
    assert cells["z"][1][0] == pytest.approx(math.log10(0.004))  # values over two powers of ten: logarithmic colours
    assert nothing["z"] == [[None, 1], [None, None]]
    assert nothing["text"] == [["", "n/a"], ["", ""]]
    assert figure["layout"]["xaxis"]["title"]["text"] == "kernel"
    assert cells["colorbar"]["title"]["text"] == "rel. error"


def test_colours_follow_the_kind_of_numbers() -> None:
    def cells(*values: float) -> dict:
        return heat_figure(HeatMap("t", "x", "y", "v", ("a", "b"), ("c",), (values,)))["data"][0]

    around_zero = cells(-1.0, 3.0)
    assert (around_zero["zmin"], around_zero["zmax"]) == (-3, 3)
    assert cells(0.2, 0.4)["z"] == [[0.2, 0.4]]
    assert "zmin" not in cells(0.2, 0.4)
    assert len(heat_figure(HeatMap("t", "x", "y", "v", ("a",), ("c",), ((None,),)))["data"]) == 2


def test_the_page_is_well_formed_and_loads_nothing(study: Study) -> None:
    page = Page(render_study_html(study))
    assert page.open == []
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if "src" in attrs or not (attrs.get("href") or "#").startswith("#")]
    policy = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy[0] or "")
    assert [attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs] == ["line-0", "heat-0"]
    assert all(attrs.get("aria-label") for _, attrs in page.tags if "data-chart" in attrs)


def test_both_renderings_hold_what_was_found(study: Study) -> None:
    page, markdown = Page(render_study_html(study)).text, render_study_markdown(study)
    wanted = [
        study.question,
        study.findings[0],
        *study.warnings,
        "0.0123",
        "16,384",
        "n/a",
        "Three seeds.",
        "a processor",
    ]
    wanted += ["Error over features", "uniform (baseline)", "Setting features", "[32, 128]", "Time to measure"]
    for word in wanted:
        assert word in page, word
        assert word in markdown, word
    assert page.index(study.findings[0]) < page.index("Error over features") < page.index("Table of <errors>")
    assert "The rest is &lt; 1 &amp; a|b." in markdown
    for block in markdown.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_text_is_escaped(study: Study) -> None:
    evil = "</script><script>alert(1)</script><img src=http://x onerror=y>"
    chart = dataclasses.replace(
        CHART, title=evil, x_label=evil, lines=(dataclasses.replace(CHART.lines[0], name=evil),)
    )
    heat = dataclasses.replace(HEAT, x=(evil, "b"), value_label=evil, note=evil)
    table = StudyTable(evil, (evil,), ((evil,),), evil)
    changed = dataclasses.replace(
        study, question=evil, findings=(evil,), warnings=(evil,), charts=(chart,), heat_maps=(heat,), tables=(table,)
    )
    page = Page(render_study_html(changed))
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in page.tags}


def test_a_study_without_charts_and_tables_still_reads(study: Study) -> None:
    bare = dataclasses.replace(study, tables=(), charts=(), heat_maps=(), warnings=(), measurements=(), seconds={})
    assert Page(render_study_html(bare)).open == []
    assert "## Charts" not in render_study_markdown(bare)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_is_read_back_equal(study: Study, tmp_path: Path) -> None:
    paths = write_study(study, tmp_path / "a" / "b")
    assert set(paths) == {"html", "md", "json"}
    assert names(tmp_path / "a" / "b") == sorted(STUDY_NAMES)
    assert load_study(paths["json"]) == study


def test_an_earlier_study_is_refused_and_force_replaces_it(study: Study, tmp_path: Path) -> None:
    (tmp_path / "study.md").write_text("mine")
    (tmp_path / "other.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"already holds study\.md.*--force"):
        check_study_dir(tmp_path, "theory")
    with pytest.raises(FileExistsError, match="--force"):
        write_study(study, tmp_path)
    assert names(tmp_path) == ["other.txt", "study.md"]
    write_study(study, tmp_path, force=True)
    assert names(tmp_path) == sorted(["other.txt", *STUDY_NAMES])
    assert (tmp_path / "other.txt").read_text() == "kept"


def test_what_an_interrupted_study_left_is_welcome_to_its_own(study: Study, tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL_NAME
    assert journal_study(journal) is None
    journal.write_text(json.dumps({"key": {"study": "theory"}, "measurement": {}}) + "\n")
    assert journal_study(journal) == "theory"
    assert check_study_dir(tmp_path, "theory") == tmp_path
    with pytest.raises(FileExistsError, match=r"holds measurements of the study 'theory', not 'ppsbn'.*--force"):
        check_study_dir(tmp_path, "ppsbn")
    assert check_study_dir(tmp_path, "ppsbn", force=True) == tmp_path
    journal.write_text("not json\n")
    assert check_study_dir(tmp_path, "ppsbn") == tmp_path  # says nothing
    write_study(study, tmp_path)
    assert names(tmp_path) == sorted([*STUDY_NAMES, JOURNAL_NAME])
    journal.unlink()
    journal.mkdir()
    with pytest.raises(FileExistsError, match="is a directory"):
        check_study_dir(tmp_path, "theory", force=True)


def test_checking_creates_nothing_and_names_a_file_in_the_way(tmp_path: Path) -> None:
    assert check_study_dir(tmp_path / "new" / "deep", "theory") == tmp_path / "new" / "deep"
    (tmp_path / "x").write_text("")
    with pytest.raises(NotADirectoryError, match="directory for the study"):
        check_study_dir(tmp_path / "x", "theory")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_leaves_what_was_there_before(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    for name in STUDY_NAMES:
        (tmp_path / name).write_text(f"earlier {name}")
    real, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append((source, target))
        if len(calls) == call:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_study(study, tmp_path, force=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {n: f"earlier {n}" for n in STUDY_NAMES}


def test_loading_says_what_is_wrong(study: Study, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wanted a study\.json, but there is no"):
        load_study(tmp_path / "missing.json")
    with pytest.raises(IsADirectoryError, match=r"pass the path of a study\.json"):
        load_study(tmp_path)
    path = tmp_path / "study.json"
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"study\.json: not a study .*not JSON"):
        load_study(path)
    path.write_text(json.dumps({**json.loads(to_json(study)), "schema_version": "9.0"}))
    with pytest.raises(ValueError, match=rf"wanted a study of schema {SCHEMA_VERSION}, got '9\.0'"):
        load_study(path)
    data = json.loads(to_json(study))
    data["tables"][0]["rows"][0][2] = [1]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tables\[0\]\.rows\[0\]\[2\]: wanted str or float"):
        load_study(path)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.03, 0.4), ["0.05", "0.1", "0.2"]),
        ((2e-5, 3.0), ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]),
        ((20.0, 3e4), ["10", "100", "1,000", "10,000"]),
    ],
)
def test_a_logarithmic_axis_has_round_ticks_within_its_range(values: tuple[float, float], ticks: list[str]) -> None:
    axis = line_figure(LineChart("t", "x", "y", (Line("a", (1.0, 2.0), values),), log_y=True))["layout"]["yaxis"]
    low, high = axis["range"]
    assert all(10**low <= value * 1.001 and value <= 10**high * 1.001 for value in axis["tickvals"])
    assert set(axis["ticktext"]) >= set(ticks) - {"1e-5", "10"}
    assert len(axis["tickvals"]) == len(axis["ticktext"]) <= 13
