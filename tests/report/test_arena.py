"""The tables of the arena: what they say, from figures made up so that the answer is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from maclin.records import ArenaCost, ArenaLook, ArenaResult, ArenaRun, ArenaTask, ArenaTaskResult, Environment
from maclin.report.arena import (
    ARENA_NAMES,
    findings_of,
    load_arena,
    render_arena_html,
    render_arena_markdown,
    score_table,
    write_arena,
)
from maclin.report.arena_charts import learning_curves
from maclin.report.arena_picture import render_arena_svg
from maclin.report.arena_rows import counts, mean_of, rows_of
from maclin.report.arena_tables import cost_tables, overview_table, score_text

MACHINE = Environment("2026-01-01", "0", "3.11", "2.13", None, "linux", "a processor", "cpu", 2, "float32")
TASK = ArenaTask(
    "listops", "quick", "accuracy", "accuracy", True, 200, 2000, 900, 100, 200, "majority", 0.15, ("short",)
)
SCORES = {"softmax": (0.40, 0.42), "mean": (0.30, 0.32), "macformer": (0.405, 0.4), "favor <b>": (0.2, 0.22)}


def run_of(label: str, seed: int, score: float) -> ArenaRun:
    looks = tuple(ArenaLook(step, step * (1.0 + seed), 1.0, score * step / 30) for step in (10, 20, 30))
    return ArenaRun(
        label, label, {}, seed, score, {"accuracy": score, "loss": 1.0}, 30, 30, seed, 1234, 30.0, 5000.0, looks,
        environment=MACHINE,
    )  # fmt: skip


def costs_at(length: int) -> tuple[ArenaCost, ...]:
    return (
        ArenaCost("softmax", length, 4, 100.0, 90.0, 110.0, 5, 4 << 20),
        ArenaCost("softmax (unfused)", length, 4, None, peak_bytes=None, reason="needs about 9 GiB"),
        ArenaCost("mean", length, 4, 10.0, 9.0, 11.0, 5, 1 << 20),
        ArenaCost("macformer", length, 4, 40.0, 39.0, 41.0, 5, 2 << 20),
        ArenaCost("favor <b>", length, 4, 200.0, 190.0, 210.0, 5, 8 << 20),
    )


@pytest.fixture
def result() -> ArenaTaskResult:
    runs = [run_of(label, seed, score) for label, scores in SCORES.items() for seed, score in enumerate(scores)]
    runs.append(ArenaRun("linformer", "linformer", {}, 0, reason="it has no causal form"))
    return ArenaTaskResult(TASK, {"train": {"lr": 0.001}}, tuple(runs), (*costs_at(200), *costs_at(2000)))


@pytest.fixture
def found(result: ArenaTaskResult) -> ArenaResult:
    return ArenaResult("1.1", MACHINE, (result,), ("look twice",))


def cells(result: ArenaTaskResult, label: str) -> dict[str, str]:
    table = score_table(result)
    return next(dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == label)


def test_scores_are_means_with_spread_beside_softmax(result: ArenaTaskResult) -> None:
    row = cells(result, "macformer")
    assert row["accuracy (%)"] == "40.2 ± 0.4"  # 40.25, and 0.354 of 40.5 and 40
    assert row["to softmax"] == "-0.75"
    assert row["seeds"] == "2"
    assert row["times faster at 2,000"] == "2.50"
    assert row["times less memory"] == "2.00"
    assert cells(result, "favor <b>")["to softmax"] == "-20.0"
    assert cells(result, "majority")["accuracy (%)"] == "15.0"
    assert cells(result, "majority")["to softmax"] == "-26.0"


def test_what_cannot_be_done_stays_in_the_table_with_the_reason(result: ArenaTaskResult) -> None:
    assert set(cells(result, "linformer").values()) == {"linformer", "-"}
    assert "linformer: it has no causal form" in score_table(result).notes


def test_the_notes_say_what_was_shortened_and_what_was_skipped(result: ArenaTaskResult) -> None:
    notes = " ".join(score_table(result).notes)
    assert "Short. Trained on 200 positions; a step is measured at 2,000" in notes
    assert "900 examples to train on, 100 held out" in notes
    assert "macformer: 1 steps were not finite" in notes


def test_costs_stand_beside_fused_and_unfused_softmax(result: ArenaTaskResult) -> None:
    first, second = cost_tables(result)
    assert "at 200 positions" in first.title
    rows = {row[0]: dict(zip(second.columns, row, strict=True)) for row in second.rows}
    assert rows["macformer"]["step (ms)"] == "40"
    assert rows["macformer"]["quartiles (ms)"] == "39 to 41"
    assert rows["macformer"]["memory"] == "2.00 MiB"
    assert rows["macformer"]["than unfused"] == "-"
    assert "softmax (unfused): needs about 9 GiB" in second.notes


@pytest.mark.parametrize(("gap", "wanted"), [(0.06, True), (0.05, True), (0.04, False)])
def test_a_task_counts_where_softmax_is_far_above_averaging(result: ArenaTaskResult, gap: float, wanted: bool) -> None:
    runs = (run_of("softmax", 0, 0.5), run_of("mean", 0, 0.5 - gap), run_of("macformer", 0, 0.495))
    changed = replace(result, runs=runs)
    assert counts(changed) is wanted
    sentences = findings_of(ArenaResult("1.1", MACHINE, (changed,)))
    assert ("macformer on 1 of 1" in sentences[0]) is wanted
    assert any("tells mechanisms apart poorly" in text for text in sentences) is not wanted


def test_findings_name_losses_too(found: ArenaResult) -> None:
    first, second, third = findings_of(found)
    assert first.startswith("Where softmax is at least 5 points above averaging (listops (quick))")
    assert first.endswith("macformer on 1 of 1, favor <b> on 0 of 1, linformer on 0 of 1.")
    assert second == "listops (quick): softmax is best with 41.0 ± 1.4 %, mean has 31.0 ± 1.4."
    assert third.endswith("macformer 2.5 (2.0), favor <b> 0.5 (0.5).")


def test_less_perplexity_is_better(result: ArenaTaskResult) -> None:
    task = replace(TASK, metric="perplexity", watched="perplexity", higher_is_better=False, trivial_score=20.0)
    runs = tuple(replace(run_of(name, 0, score), scores={}) for name, score in (("softmax", 5.0), ("elu", 6.0)))
    changed = replace(result, task=task, runs=runs)
    assert [row.distance for row in rows_of(changed)] == [0.0, -1.0]
    assert counts(changed) is None
    assert "softmax is best with 5.00 perplexity" in findings_of(ArenaResult("1.1", MACHINE, (changed,)))[0]
    assert all(chart.log_y for chart in learning_curves(changed))


def test_curves_at_equal_steps_and_at_equal_time(result: ArenaTaskResult) -> None:
    steps, time = learning_curves(result)
    line = next(line for line in steps.lines if line.name == "macformer")
    assert line.x == (10, 20, 30)
    assert line.y == pytest.approx((13.4167, 26.8333, 40.25), abs=1e-3)
    assert (line.low[-1], line.high[-1]) == pytest.approx((40.0, 40.5))
    assert [line.name for line in steps.lines if line.is_baseline] == ["softmax", "mean", "majority"]
    # seed 0 is at step 30 after 30 s, when seed 1, half as fast, is halfway: 2.5 looks' worth between them
    slow = next(line for line in time.lines if line.name == "macformer")
    at = slow.x.index(30.0)
    assert slow.y[at] == pytest.approx(100 * (0.405 + 0.4 * 15 / 30) / 2)
    assert max(slow.x) <= 30.0  # beyond that one of the seeds has ended


def test_several_tasks_get_a_table_of_all(result: ArenaTaskResult, found: ArenaResult) -> None:
    assert overview_table(found) is None
    other = replace(result, task=replace(TASK, name="text"), runs=result.runs[:2])
    table = overview_table(replace(found, tasks=(result, other)))
    assert table is not None
    assert table.rows[0] == ("softmax", "41.0 ± 1.4", "41.0 ± 1.4")
    assert table.rows[2] == ("macformer", "40.2 ± 0.4", "-")


def test_one_value_has_no_spread() -> None:
    assert mean_of([None, None]) is None
    assert score_text(mean_of([3.0])) == "3.00"
    assert score_text(mean_of([3.0, 4.0])) == "3.50 ± 0.71"
    assert score_text(None) == "-"


def test_the_page_is_whole_and_its_text_escaped(found: ArenaResult) -> None:
    page = render_arena_html(found)
    assert "favor &lt;b&gt;" in page
    assert "favor <b>" not in page
    assert "look twice" in page
    assert not re.search(r'(?:src|href)="https?:', page.partition("<script>")[0])
    assert page.count("data-chart=") >= 2


def test_markdown_has_every_table(found: ArenaResult) -> None:
    text = render_arena_markdown(found)
    for title in ("## Tables", "## Learning curves", "## How it was measured", "at 2,000 positions", "favor &lt;b>"):
        assert title in text


def test_what_is_written_is_read_back(found: ArenaResult, tmp_path: Path) -> None:
    paths = write_arena(found, tmp_path)
    assert sorted(path.name for path in paths.values()) == sorted(ARENA_NAMES)
    assert load_arena(paths["json"]) == found
    write_arena(replace(found, warnings=()), tmp_path)  # tables are made anew whenever there is more to show
    assert load_arena(paths["json"]).warnings == ()
    paths["json"].write_text(json.dumps({"schema_version": "7.0"}))
    with pytest.raises(ValueError, match="schema"):
        load_arena(paths["json"])


def test_the_picture_holds_every_mechanism_and_every_score(found: ArenaResult) -> None:
    drawn = ElementTree.fromstring(render_arena_svg(found))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in drawn.iter(f"{space}text")]
    assert {"macformer", "softmax", "mean", "favor <b>", "linformer", "accuracy (%), 200 positions"} <= set(texts)
    assert texts.index("macformer") < texts.index("softmax") < texts.index("favor <b>")
    # four scores, and four steps that were measured at the full length; linformer has neither
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0)), c.get("fill")) for c in drawn.iter(f"{space}circle")]
    assert len(circles) == 8
    assert texts.count("–") == 2
    rows = {name: float(t.get("y", 0)) for t in drawn.iter(f"{space}text") if (name := t.text) in SCORES}
    scores, times = (
        {name: min(x for x, y, _ in part if abs(y - row) < 8) for name, row in rows.items()}
        for part in (sorted(circles)[:4], sorted(circles)[4:])
    )
    assert sorted(scores, key=scores.__getitem__) == ["favor <b>", "mean", "macformer", "softmax"]
    assert sorted(times, key=times.__getitem__) == ["favor <b>", "softmax", "macformer", "mean"]
    nothing = replace(found, tasks=(replace(found.tasks[0], runs=found.tasks[0].runs[-1:], costs=()),))
    assert "linformer" in render_arena_svg(nothing)


def test_the_picture_of_many_tasks_stays_as_wide_as_a_page(found: ArenaResult) -> None:
    one = found.tasks[0]
    many = replace(found, tasks=tuple(replace(one, task=replace(one.task, name=name)) for name in "abcd"))
    drawn, alone = (ElementTree.fromstring(render_arena_svg(result)) for result in (many, found))
    space = "{http://www.w3.org/2000/svg}"
    width, height = (float(drawn.get(name, 0)) for name in ("width", "height"))
    assert width < 1.5 * float(alone.get("width", 0))
    texts = [text.text for text in drawn.iter(f"{space}text")]
    assert texts.count("macformer") == 2  # four scores and four times, on two shelves
    places = {(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in drawn.iter(f"{space}circle")}
    assert len(places) == 4 * 8
    assert all(0 < x < width and 0 < y < height for x, y in places)
