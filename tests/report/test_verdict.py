from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from maclin.records import BreakEven, FrontierPoint, ModelInfo, Plan, PlanRow, Report, RolloutStage, Timing, Verdict
from maclin.report import RULE, decide, point_to_time, rollout_stages
from maclin.report import verdict as rule
from maclin.report.rollout import allowed_below

MODEL = ModelInfo("m", "transformers", "M", 4, 8, 8, 64, 512, 2048, 10_000_000)
PLAN = Plan(0.1, 2048, tuple(PlanRow(f"layer.{i}", "softmax", {}, 0.0, "", None, {}, None) for i in range(4)))


def point(
    number: int, cosine: float, ms: float | None, p05: float = 0.96, agreement: float | None = 0.96, mib: int = 100
) -> FrontierPoint:
    layers = tuple(f"layer.{i}" for i in range(number))
    return FrontierPoint(number, layers, ("elu",) * number, cosine, p05, agreement, ms, mib << 20, 2048)


def model(new: dict[int, float], old: dict[int, float], number: int, spread: float = 0.01) -> tuple[Timing, ...]:
    rows = [Timing("original", "model", n, ms, ms * (1 - spread), ms * (1 + spread), 9) for n, ms in old.items()]
    for n, ms in new.items():
        rows.append(Timing("converted", "model", n, ms, ms * (1 - spread), ms * (1 + spread), 9, None, None, number))
    return tuple(rows)


BASE = point(0, 1.0, 100.0, 1.0, 1.0)
OLD = {512: 20.0, 1024: 45.0, 2048: 100.0}
BREAK_EVEN = (BreakEven("elu", "attention", 4096, ""), BreakEven("taylor", "attention", 1024, ""))


def test_go_takes_the_fastest_point_that_keeps_the_quality() -> None:
    frontier = (BASE, point(1, 0.999, 90), point(2, 0.993, 80), point(3, 0.95, 70))
    verdict = decide(frontier, model({512: 25, 1024: 40, 2048: 80}, OLD, 2), BREAK_EVEN, PLAN, MODEL)
    assert (verdict.decision, verdict.recommended_num_linear) == ("go", 2)
    assert (verdict.pays_from_length, verdict.pays_scope) == (1024, "model")
    assert verdict.rule == RULE
    for number in ("2 of 4 layers", "0.993", "0.960", "96%", "1.25 times as fast", "80.0 ms", "100 ms", "1,024"):
        assert number in verdict.reason
    assert "0 of 4 layers can become linear" in verdict.reason


@pytest.mark.parametrize(
    ("changed", "decision"),
    [
        ({}, "go"),
        ({"cosine": 0.9899}, "go-after-healing"),
        ({"p05": 0.9499}, "go-after-healing"),
        ({"agreement": 0.9499}, "go-after-healing"),
        ({"agreement": None}, "go"),
        ({"ms": 95.0}, "go"),
        ({"ms": 95.1}, "no-go"),
        ({"ms": None}, "no-go"),
        ({"cosine": 0.91}, "go-after-healing"),
        ({"cosine": 0.9099}, "no-go"),
    ],
)
def test_the_frontier_alone_decides_at_each_threshold(changed: dict[str, Any], decision: str) -> None:
    at_the_bar: dict[str, Any] = {"cosine": 0.99, "p05": 0.95, "agreement": 0.95, "ms": 90.0, **changed}
    verdict = decide((BASE, point(4, **at_the_bar)), (), BREAK_EVEN, PLAN, MODEL)
    assert verdict.decision == decision
    assert verdict.recommended_num_linear == (0 if decision == "no-go" else 4)


def test_healing_takes_the_fastest_point_within_reach() -> None:
    frontier = (BASE, point(1, 0.985, 96), point(2, 0.96, 85), point(3, 0.92, 75), point(4, 0.6, 60))
    verdict = decide(frontier, model({1024: 46, 2048: 75}, OLD, 3), BREAK_EVEN, PLAN, MODEL)
    assert (verdict.decision, verdict.recommended_num_linear) == ("go-after-healing", 3)
    assert verdict.pays_from_length == 2048
    assert "heal, then judge again" in verdict.reason


def test_a_timed_curve_overrules_the_frontier_and_the_next_point_is_asked_for() -> None:
    frontier = (BASE, point(1, 0.995, 94), point(2, 0.992, 90))
    assert point_to_time(frontier) == frontier[2]
    slow = model({512: 30, 1024: 50, 2048: 97}, OLD, 2)
    assert point_to_time(frontier, slow) == frontier[1]
    slower = (*slow, *model({512: 30, 1024: 50, 2048: 99}, {}, 1))
    verdict = decide(frontier, slower, BREAK_EVEN, PLAN, MODEL)
    assert verdict.decision == "no-go"
    assert "does not get faster" in verdict.reason
    assert "2 of 4 layers linear, takes 97.0 ms and the original 100 ms" in verdict.reason


def test_overlapping_quartiles_are_not_a_gain() -> None:
    frontier = (BASE, point(2, 0.999, 90))
    assert decide(frontier, model({2048: 90}, OLD, 2, spread=0.04), (), PLAN, MODEL).decision == "go"
    assert decide(frontier, model({2048: 90}, OLD, 2, spread=0.06), (), PLAN, MODEL).decision == "no-go"


def test_a_gain_that_is_lost_again_at_longer_texts_is_not_a_gain() -> None:
    frontier = (BASE, point(2, 0.999, 90))
    assert decide(frontier, model({512: 10, 1024: 20, 2048: 99}, OLD, 2), (), PLAN, MODEL).decision == "no-go"


def test_no_go_says_from_which_length_the_attention_alone_pays() -> None:
    frontier = (BASE, point(4, 0.999, 130))
    verdict = decide(frontier, (), BREAK_EVEN, PLAN, MODEL)
    assert verdict.decision == "no-go"
    assert (verdict.pays_from_length, verdict.pays_scope) == (4096, "attention")  # elu is what the frontier uses
    assert "(elu) is faster than fused softmax from 4,096 tokens on, more than this model can take." in verdict.reason
    never = (BreakEven("elu", "attention", None, ""),)
    timings = (Timing("softmax", "attention", 8192, 1.0), Timing("elu", "attention", 8192, 2.0))
    verdict = decide(frontier, timings, never, PLAN, MODEL)
    assert (verdict.pays_from_length, verdict.pays_scope) == (None, None)
    assert "at any measured length, up to 8,192 tokens" in verdict.reason


def test_no_go_for_quality_names_the_best_that_is_faster() -> None:
    verdict = decide((BASE, point(3, 0.8, 70), point(4, 0.5, 60)), (), BREAK_EVEN, PLAN, MODEL)
    assert verdict.decision == "no-go"
    assert verdict.pays_scope == "model"
    assert "3 of 4 layers linear" in verdict.reason
    assert "0.800" in verdict.reason
    assert "0.91" in verdict.reason


def test_nothing_convertible_and_nothing_measured() -> None:
    assert "No layer of this model" in decide((BASE,), (), (), PLAN, MODEL).reason
    assert point_to_time((BASE,)) is None
    verdict = decide((BASE, point(1, 0.999, None)), (), (), PLAN, MODEL)
    assert verdict.decision == "no-go"
    assert "not measured" in verdict.reason


def test_where_nothing_is_faster_the_most_linear_model_is_timed() -> None:
    frontier = (BASE, point(1, 0.999, 120), point(4, 0.7, 130))
    assert point_to_time(frontier) == frontier[2]


def test_a_converted_timing_must_say_how_many_layers_are_linear() -> None:
    with pytest.raises(ValueError, match="num_linear"):
        decide((BASE, point(1, 0.999, 90)), (Timing("converted", "model", 512, 1.0),), (), PLAN, MODEL)


def test_the_thresholds_hang_together() -> None:
    assert pytest.approx(1 - (1 - rule.GO_COSINE) / rule.HEALING_LEAVES, abs=0.005) == rule.HEALABLE_COSINE
    for number in (rule.GO_COSINE, rule.GO_COSINE_P05, rule.HEALABLE_COSINE):
        assert str(number) in RULE


def stages(report: Report) -> dict[str, RolloutStage]:
    found = rollout_stages(report.verdict, report.frontier, report.timings, report.plan)
    assert [stage.name for stage in found] == ["offline", "shadow", "canary", "full"]
    return {stage.name: stage for stage in found}


def test_rollout_of_a_go_uses_the_measured_numbers(make_report) -> None:
    report = make_report("go")
    chosen = report.frontier[report.verdict.recommended_num_linear]
    found = stages(report)
    assert [stage.traffic_share for stage in found.values()] == [0.0, 0.0, 0.05, 1.0]
    assert f"cosine below {chosen.cosine_p05:.3f}" in found["shadow"].indicators[0].name
    assert "7.1% of 1,000" in found["shadow"].indicators[0].threshold
    speed = rule.speed_of(chosen, report.frontier, report.timings)
    assert speed is not None
    latency = next(row for row in found["canary"].indicators if "latency" in row.name)
    assert latency.threshold == f"at most {1.1 * speed.ratio:.2f}"
    assert any("not measured in this report" in row.source for row in found["full"].indicators)


def test_rollout_after_healing_uses_the_bar_of_the_rule(make_report) -> None:
    found = stages(make_report("go-after-healing"))
    assert "heal" in found["offline"].action
    assert "cosine below 0.950" in found["shadow"].indicators[0].name


def test_rollout_of_a_no_go_supports_the_offline_stage_only(make_report) -> None:
    found = stages(make_report("no-go"))
    assert all("Not supported" in found[name].action for name in ("shadow", "canary", "full"))
    assert all(stage.traffic_share == 0 for stage in found.values())


def test_a_go_without_its_frontier_point_supports_no_stage() -> None:
    verdict = Verdict("go", "", "", 3, None)
    assert all(stage.traffic_share == 0 for stage in rollout_stages(verdict, (BASE,), (), PLAN))


def test_latency_threshold_never_allows_to_be_slower() -> None:
    frontier = (BASE, point(2, 0.999, 94.0))
    verdict = decide(frontier, (), (), PLAN, MODEL)
    row = next(r for r in rollout_stages(verdict, frontier, (), PLAN)[1].indicators if "latency" in r.name)
    assert row.threshold == "at most 1.00"


def test_allowed_share_is_three_standard_deviations_up() -> None:
    assert allowed_below(0.05, 1000) == pytest.approx(0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5)
    assert allowed_below(0.5, 1) == 1.0


def test_peak_memory_has_an_indicator_only_where_measured() -> None:
    bare = tuple(dataclasses.replace(p, peak_bytes=None) for p in (BASE, point(2, 0.999, 80)))
    verdict = decide(bare, (), (), PLAN, MODEL)
    assert not any("memory" in row.name for row in rollout_stages(verdict, bare, (), PLAN)[1].indicators)
