"""A result of ``maclin bench`` rendered, written, and read back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from maclin.records import (
    SCHEMA_VERSION,
    BenchResult,
    BenchRow,
    BreakEven,
    Change,
    Comparison,
    Environment,
    Floor,
    Growth,
    Rates,
    Timing,
)
from maclin.report import (
    bench_names,
    load_bench,
    render_bench_html,
    render_bench_markdown,
    render_comparison,
    write_bench,
)
from maclin.report.bench_charts import bench_drawings
from maclin.report.bench_tables import bench_findings, summary

MACHINE = Environment("2026-01-31", "0", "3.11", "2.13", None, "linux", "A <b>CPU</b>", "cpu", 2, "float32")
LENGTHS = (1000, 2000, 4000)


def row(subject: str, length: int, ms: float | None, floor_ms: float | None, kind: str = "mechanism") -> BenchRow:
    if ms is None:
        return BenchRow(Timing(subject, "attention", length, None, reason="it is <wrong>"), kind)
    timing = Timing(subject, "attention", length, ms, 0.9 * ms, 1.1 * ms, 7, peak_bytes=4 * length)
    limit = None if floor_ms is None else Floor(1, 1, floor_ms / 2, floor_ms)
    return BenchRow(timing, kind, limit, 3 * length, 4 * length)


@pytest.fixture
def result() -> BenchResult:
    rows: list[BenchRow] = []
    for n in LENGTHS:
        rows.append(row("softmax", n, n * n / 1e6, n * n / 2e6, "baseline"))
        rows.append(row("fast<er>", n, n / 1e3, n / 4e3))
        rows.append(row("peer (pip)", n, n / 5e2, None, "peer"))
        rows.append(row("wrong", n, None, None))
    return BenchResult(
        SCHEMA_VERSION,
        "speed",
        MACHINE,
        {"mechanisms": ["fast<er>", "wrong"], "causal": False, "backward": False},
        Rates(1e10, 1e11, 2**23, "a shape", "float32"),
        tuple(rows),
        (Growth("fast<er>", "time", 1.0, 1000, 4000),),
        (BreakEven("fast<er>", "attention", 2000, "a note"), BreakEven("peer (pip)", "attention", 4000, "")),
        ("a <warning>",),
        {"measure": 1.0},
    )


def test_findings_are_computed(result: BenchResult) -> None:
    assert bench_findings(result) == (
        "At 4,000 tokens, fast<er> is the fastest: 4.00 times as fast as softmax, 4.00 ms against 16.0 ms.",
        "fast<er> is nearest to the limit of this machine there: 25% of it.",
        "fast<er> is faster than softmax from 2,000 tokens on, the earliest of the mechanisms.",
        "Without a figure at some length, for the reason in the table: wrong.",
    )


def test_findings_without_a_winner(result: BenchResult) -> None:
    never = dataclasses.replace(result, break_even=(BreakEven("fast<er>", "attention", None, ""),))
    assert "No mechanism was faster than softmax at the lengths that were measured." in bench_findings(never)
    assert bench_findings(dataclasses.replace(result, rows=(), break_even=())) == ("Nothing was measured.",)


@pytest.mark.parametrize("what", ["memory", "decode"])
def test_other_kinds_have_words_of_their_own(result: BenchResult, what: str) -> None:
    found = dataclasses.replace(result, what=what)
    text = render_bench_markdown(found)
    assert ("At position 4,000" in text) == (what == "decode")
    assert ("Share of floor" in text) == (what == "decode")
    assert ("State" in text) == (what == "decode")


def test_markdown_holds_every_figure_and_reason_once(result: BenchResult) -> None:
    text = render_bench_markdown(result)
    for n in LENGTHS:
        assert re.search(rf"fast&lt;er> +\| mechanism +\| +{n:,} \|.* 25% \|", text)
    assert text.count("wrong at 1,000, 2,000, 4,000: it is &lt;wrong>.") == 1
    assert "10.0 GB/s read and written" in text
    assert "100 GFLOP/s, best with a shape" in text
    assert "a &lt;warning>" in text


def test_the_page_is_whole_and_escaped(result: BenchResult) -> None:
    page = render_bench_html(result)
    assert "<wrong>" not in page
    assert "<warning>" not in page
    assert "fast<er>" not in page
    charts = json.loads(page.split("const charts = ")[1].split(";\nconst elements")[0])
    assert set(charts) == {"latency", "shares", "memory"}
    assert 'src="http' not in page


def test_the_latency_chart_has_the_floor_of_each(result: BenchResult) -> None:
    drawing = bench_drawings(result)[0]
    dashed = [trace for trace in drawing.figure["data"] if str(trace.get("name", "")).startswith("floor of")]
    assert [trace["name"] for trace in dashed] == ["floor of softmax", "floor of fast&lt;er&gt;"]
    assert dashed[1]["y"] == [n / 4e3 for n in LENGTHS]
    low, high = drawing.figure["layout"]["yaxis"]["range"]
    assert low < math.log10(min(dashed[1]["y"]))
    assert high > math.log10(17.6)
    solid = {trace["name"]: trace["line"]["color"] for trace in drawing.figure["data"] if "name" in trace}
    assert solid["fast&lt;er&gt;"] == solid["floor of fast&lt;er&gt;"] != solid["softmax"] == solid["floor of softmax"]


def test_bars_are_shares_of_the_longest_lengths(result: BenchResult) -> None:
    shares = next(drawing for drawing in bench_drawings(result) if drawing.key == "shares")
    assert [trace["name"] for trace in shares.figure["data"]] == ["1,000", "2,000", "4,000"]
    assert shares.figure["data"][0]["x"] == ["softmax", "fast&lt;er&gt;"]  # a peer has no floor
    assert shares.figure["data"][0]["y"] == pytest.approx([50.0, 25.0])
    assert shares.table.rows == (("softmax", "50%", "50%", "50%"), ("fast<er>", "25%", "25%", "25%"))


def test_without_figures_there_is_no_chart(result: BenchResult) -> None:
    rows = tuple(found for found in result.rows if found.timing.reason is not None)
    assert bench_drawings(dataclasses.replace(result, rows=rows)) == []


def test_the_terminal_has_the_main_columns(result: BenchResult) -> None:
    lines = summary(result).splitlines()
    assert len(lines) == 1 + len(result.rows)
    assert lines[0].split()[:2] == ["Attention", "Tokens"]
    assert "Quartiles" not in lines[0]


def test_written_and_read_back(result: BenchResult, tmp_path: Path) -> None:
    paths = write_bench(result, tmp_path / "out")
    assert {path.name for path in paths.values()} == {
        f"bench-speed_2026-01-31_a-b-cpu-b-2-threads.{suffix}" for suffix in ("html", "md", "json")
    }
    assert load_bench(paths["json"]) == load_bench(tmp_path / "out") == result
    with pytest.raises(FileExistsError, match="pass --force"):
        write_bench(result, tmp_path / "out")
    write_bench(result, tmp_path / "out", force=True)


def test_names_tell_kinds_apart() -> None:
    bf16 = dataclasses.replace(MACHINE, dtype="bfloat16")
    names = {
        bench_names("speed", {}, MACHINE)[2],
        bench_names("speed", {"causal": True}, MACHINE)[2],
        bench_names("speed", {"backward": True}, MACHINE)[2],
        bench_names("speed", {"backward": True, "causal": True}, MACHINE)[2],
        bench_names("speed", {}, bf16)[2],
        bench_names("memory", {}, MACHINE)[2],
        bench_names("decode", {"causal": True}, MACHINE)[2],
    }
    assert len(names) == 7


def test_what_is_no_result(tmp_path: Path, result: BenchResult) -> None:
    with pytest.raises(IsADirectoryError, match="it holds none"):
        load_bench(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_bench(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: not a result of schema .* got None"):
        load_bench(tmp_path / "bad.json")
    write_bench(result, tmp_path)
    write_bench(dataclasses.replace(result, what="memory"), tmp_path)
    with pytest.raises(IsADirectoryError, match=r"it holds bench-memory.*, bench-speed"):
        load_bench(tmp_path)


def test_a_comparison_begins_with_what_regressed() -> None:
    changes = (
        Change("a", 10, "time", 1.0, 1.0, 1.0, 0.9, 1.1, "same"),
        Change("b", 10, "time", 1.0, 2.0, 2.0, 1.8, 2.2, "regressed"),
        Change("c", 10, "memory", 2048, 1024, 0.5, 0.5, 0.5, "improved"),
        Change("d", 10, "time", 1.0, None, None, None, None, "not comparable", "measured in one of them only"),
    )
    text = render_comparison(Comparison("speed", MACHINE, MACHINE, 0.05, changes, ("a warning",)))
    assert text.startswith("speed: 2026-01-31 against 2026-01-31; 1 of 4 figures regressed by more than 5 %")
    verdicts = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]
    assert verdicts == ["regressed", "improved", "same", "not comparable"]
    assert "! a warning" in text
    assert "2.00 KiB" in text
    calm = render_comparison(Comparison("speed", MACHINE, MACHINE, 0.05, changes[:1]))
    assert "nothing regressed" in calm
