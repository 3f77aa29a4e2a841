"""What a report says of a plan: mixtures by head, costs, the frontier, and plans for a speed-up."""

from collections.abc import Callable
from dataclasses import replace

from maclin.records import Plan, PlanPoint, PlanRow, Report
from maclin.report import render_markdown
from maclin.report.plan_tables import plan_frontier_table, plan_table
from maclin.report.sections import headlines

GROUPS = [
    {"heads": [0, 1, 3], "mechanism": "window", "options": {"window": 32}},
    {"heads": [2], "mechanism": "softmax", "options": {}},
]


def planned(report: Report) -> Report:
    """The sample report with a plan for a speed-up, one layer of it mixed by head."""
    first = replace(
        report.plan.rows[0],
        mechanism="by_head",
        config={"heads": GROUPS},
        num_heads=4,
        relative_cost=0.4,
        latency_ms=4.0,
        exact_latency_ms=10.0,
    )
    points = (PlanPoint(1.0, 0.0, 0, 0, 60.0), PlanPoint(0.9, 0.2, 0, 1, 54.0))
    plan = replace(
        report.plan,
        rows=(first, *report.plan.rows[1:]),
        tolerance=None,
        speedup=1.1,
        costs="measured",
        device="a processor",
        relative_cost=0.9,
        attention_ms=54.0,
        exact_attention_ms=60.0,
        rel_error=0.2,
        predicts_output=True,
        frontier=points,
        notes=("some costs were extrapolated",),
    )
    return replace(report, plan=plan)


def test_the_plan_of_a_speedup(report: Report) -> None:
    found = planned(report)
    table = plan_table(found)
    assert table.title == "Plan at a speed-up of 1.1 of the attention"
    assert table.rows[0][1] == "by_head (3 heads window (window=32), 1 head softmax)"
    assert table.rows[0][-3:] == ("0.400", "4.00 ms", "10.0 ms")
    assert table.rows[1][-3:] == ("-", "-", "-")
    assert "on a processor" in table.notes[0]
    frontier = plan_frontier_table(found)
    assert frontier is not None
    assert frontier.rows[1] == ("1.11", "0.200", "0", "1", "54.0 ms")
    assert "output" in frontier.notes[0]
    text = render_markdown(found)
    assert "The plan at a speed-up of 1.1 of the attention" in text
    assert "some costs were extrapolated" in text
    assert headlines(found)[0].label == "Layers changed by the plan"


def test_a_plan_of_an_earlier_version_has_no_costs(report: Report) -> None:
    assert plan_frontier_table(report) is None
    assert len(plan_table(report).columns) == 6
    assert "The plan within the tolerance" in render_markdown(report)


def test_the_share_counts_heads(make_report: Callable[[str], Report]) -> None:
    plan = planned(make_report("go")).plan
    assert plan.linear_share == 0.75 / len(plan.rows)
    half = PlanRow("a", "window", {}, 0.1, "", None, {}, None)
    assert Plan(0.1, 512, (half, plan.rows[1])).linear_share == 0.5


def test_a_hybrid_is_shown_by_its_window_and_sinks(report: Report) -> None:
    config = {"window": 64, "sinks": 4, "linear_options": {"num_features": 128, "ppsbn": False}}
    row = replace(report.plan.rows[0], mechanism="hybrid", config=config)
    plan = replace(report.plan, rows=(row, *report.plan.rows[1:]))
    assert plan_table(replace(report, plan=plan)).rows[0][1] == "hybrid (window=64, sinks=4)"
    assert "hybrid (window=64, sinks=4)" in str(plan)
    assert "linear_options" not in render_markdown(replace(report, plan=plan)) + str(plan)
