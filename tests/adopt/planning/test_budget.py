"""Budgets: a plan for each, against trying everything; and what is said where none keeps it."""

import itertools
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import maclin
from maclin.adopt import load_plan, plan, save_plan
from maclin.adopt.planning.cost_bench import Cost
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.records import Audit, Config, LayerAudit, MechanismError, Plan, from_json, to_json

MECHANISMS = ("window", "elu", "favor", "efficient")
HEADS = 4


@dataclass(frozen=True)
class Table:
    """Costs that were made up; the heads of a layer share a mechanism's cost alike, after a tenth of it."""

    milliseconds: dict[tuple[str, str], float]
    length: int = 4096
    kind: str = "measured"
    device: str = "a processor"
    extrapolated: dict[str, int] = field(default_factory=dict)

    def of(self, layer: LayerAudit, name: str, config: Config, key_heads: int | None = None) -> Cost:
        if (layer.layer, name) not in self.milliseconds:
            raise MaclinError(f"{name} was not measured")
        whole = self.milliseconds[layer.layer, name]
        share = 1.0 if key_heads is None else 0.1 + 0.9 * key_heads / layer.num_kv_heads
        return Cost(share * whole, self.extrapolated.get(name))

    def per_head(self, layer: LayerAudit) -> float:
        return 0.01


def audited(number: int, seed: int = 0, sensitive: bool = True) -> Audit:
    draw = random.Random(seed)
    rows = []
    for i in range(number):
        energy = [draw.uniform(0.2, 1) for _ in range(HEADS)]
        energy = [e / sum(energy) for e in energy]
        errors = []
        for name in ("mean", *MECHANISMS):
            by_head = tuple(draw.uniform(0.05, 0.9) for _ in range(HEADS))
            whole = math.sqrt(sum(e * x**2 for e, x in zip(energy, by_head, strict=True)))
            errors.append(MechanismError(name, {"window": 8} if name == "window" else {}, whole, by_head))
        sensitivity = draw.uniform(0.01, 0.5) if sensitive else None
        row = LayerAudit(f"layer {i}", HEADS, HEADS, 8, 99, (), 0.9, (0.9,) * HEADS, tuple(errors))
        rows.append(replace(row, energy_by_head=tuple(energy), sensitivity=sensitivity))
    return Audit(tuple(rows), 4096, 20, architecture="BertModel")


def table(audit: Audit, seed: int = 0, **options: Any) -> Table:
    draw = random.Random(seed)
    found = {}
    for row in audit.layers:
        found[row.layer, "softmax"] = 10.0
        found |= {(row.layer, name): draw.uniform(0.5, 11.0) for name in MECHANISMS}
    return Table(found, **options)


def everything(audit: Audit, costs: Table) -> list[tuple[float, float, int, int, tuple[float, ...]]]:
    """Time, error, linear and changed layers, and errors of the layers, of every plan without mixtures."""
    options = []
    for row in audit.layers:
        known = {e.mechanism: e.rel_error or 0.0 for e in row.errors}
        options.append([(10.0, 0.0, 0), *((costs.milliseconds[row.layer, m], known[m], 1) for m in MECHANISMS)])
    found = []
    for picks in itertools.product(*options):
        error = math.sqrt(sum((row.sensitivity or 0) * p[1] ** 2 for row, p in zip(audit.layers, picks, strict=True)))
        linear = sum(p[2] for p in picks)
        found.append((sum(p[0] for p in picks), error, linear, linear, tuple(p[1] for p in picks)))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.0])
def test_a_speedup_is_kept_at_the_least_error(seed: int, speedup: float) -> None:
    found = audited(5, seed)
    costs = table(found, seed)
    decided = plan(found, speedup=speedup, costs=costs)
    best = min(error for time, error, *_ in everything(found, costs) if time <= 50 / speedup)
    assert decided.rel_error == pytest.approx(best)
    assert decided.predicts_output
    assert decided.attention_ms is not None
    assert decided.attention_ms <= 50 / speedup * (1 + 1e-9)
    assert decided.exact_attention_ms == pytest.approx(50)
    assert decided.attention_speedup == pytest.approx(50 / decided.attention_ms)
    total = 0.0
    for row, layer in zip(decided.rows, found.layers, strict=True):
        known = {e.mechanism: (e.rel_error, e.config) for e in layer.errors} | {"softmax": (0.0, {})}
        assert (row.rel_error, row.config) == known[row.mechanism]
        assert row.latency_ms == pytest.approx(costs.milliseconds[layer.layer, row.mechanism])
        assert row.weight == layer.sensitivity
        total += (layer.sensitivity or 0.0) * (row.rel_error or 0.0) ** 2
    assert math.sqrt(total) == pytest.approx(best)


def test_speedup_tolerance_and_counts_hold_together() -> None:
    found = audited(5, 4)
    costs = table(found, 4)
    decided = plan(found, tolerance=0.6, speedup=1.3, min_layers=2, max_layers=3, costs=costs)
    allowed = [
        error
        for time, error, linear, changed, errors in everything(found, costs)
        if time <= 50 / 1.3 and linear >= 2 and changed <= 3 and max(errors) <= 0.6
    ]
    assert decided.rel_error == pytest.approx(min(allowed))
    assert sum(row.is_linear for row in decided.rows) in (2, 3)


def test_a_number_of_layers_is_reached_at_the_least_error_also_where_it_does_not_pay() -> None:
    found = audited(4, 1)
    slow = Table({(row.layer, name): 20.0 for row in found.layers for name in MECHANISMS}
                 | {(row.layer, "softmax"): 10.0 for row in found.layers})  # fmt: skip
    decided = plan(found, min_layers=3, costs=slow)
    best = min(error for _, error, linear, *_ in everything(found, slow) if linear >= 3)
    assert decided.rel_error == pytest.approx(best)
    assert sum(row.is_linear for row in decided.rows) == 3
    assert decided.relative_cost == pytest.approx(70 / 40)


def test_a_tolerance_alone_gives_the_fastest() -> None:
    found = audited(4, 2)
    costs = table(found, 2)
    decided = plan(found, tolerance=0.55, costs=costs)
    assert decided.attention_ms == pytest.approx(
        min(time for time, *_, errors in everything(found, costs) if max(errors) <= 0.55)
    )
    few = plan(found, tolerance=0.55, max_layers=1, costs=costs)
    assert few.attention_ms == pytest.approx(
        min(time for time, _, _, changed, errors in everything(found, costs) if changed <= 1 and max(errors) <= 0.55)
    )


def test_the_frontier_is_what_no_other_plan_beats() -> None:
    found = audited(4, 3)
    costs = table(found, 3)
    points = plan(found, speedup=1.5, costs=costs).frontier
    assert [p.rel_error for p in points] == sorted(p.rel_error for p in points)
    assert [p.relative_cost for p in points] == sorted((p.relative_cost for p in points), reverse=True)
    assert (points[0].relative_cost, points[0].rel_error, points[0].num_changed) == (1.0, 0.0, 0)
    every = everything(found, costs)
    for point in points:
        assert point.attention_ms == pytest.approx(40 * point.relative_cost)
        assert not any(t < 40 * point.relative_cost - 1e-9 and e < point.rel_error - 1e-9 for t, e, *_ in every)
    assert points[-1].attention_ms == pytest.approx(min(time for time, *_ in every))


def test_heads_that_nothing_follows_stay_exact() -> None:
    by_head = (0.05, 0.05, 0.95, 0.05)
    whole = math.sqrt(sum(0.25 * e**2 for e in by_head))
    row = LayerAudit("a", 4, 4, 8, 99, (), 0.9, (0.9,) * 4, (MechanismError("elu", {}, whole, by_head),))
    found = Audit((replace(row, energy_by_head=(0.25,) * 4, sensitivity=1.0),), 4096, 20)
    costs = Table({("a", "softmax"): 10.0, ("a", "elu"): 1.0})
    assert plan(found, tolerance=0.2, costs=costs).rows[0].mechanism == "softmax"
    decided = plan(found, tolerance=0.2, per_head=True, costs=costs)
    chosen = decided.rows[0]
    assert (chosen.mechanism, chosen.exact_heads, chosen.is_linear) == ("by_head", 1, False)
    assert chosen.config["heads"] == [
        {"heads": [0, 1, 3], "mechanism": "elu", "options": {}},
        {"heads": [2], "mechanism": "softmax", "options": {}},
    ]
    assert chosen.rel_error == pytest.approx(math.sqrt(3 * 0.25 * 0.05**2))
    # a tenth of each for any head, and the rest by heads
    assert chosen.latency_ms == pytest.approx(10 * (0.1 + 0.9 / 4) + 1 * (0.1 + 0.9 * 3 / 4) + 0.01)
    assert decided.linear_share == pytest.approx(0.75)
    assert maclin.mechanism("by_head", head_dim=8, num_heads=4, **chosen.config).config == chosen.config
    with pytest.raises(OptionError, match=r"0 of 1 can become so within a tolerance of 0\.2"):
        plan(found, tolerance=0.2, per_head=True, min_layers=1, costs=costs)


def test_heads_of_one_key_head_stay_together() -> None:
    by_head = (0.05, 0.05, 0.95, 0.05)
    row = LayerAudit("a", 4, 2, 8, 99, (), 0.9, (0.9,) * 4, (MechanismError("elu", {}, 0.5, by_head),))
    found = Audit((replace(row, energy_by_head=(0.25,) * 4),), 4096, 20)
    chosen = plan(found, tolerance=0.2, per_head=True, costs=Table({("a", "softmax"): 9.0, ("a", "elu"): 1.0})).rows[0]
    assert [group["heads"] for group in chosen.config["heads"]] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(3))
def test_mixtures_are_never_worse(seed: int) -> None:
    found = audited(4, seed)
    costs = table(found, seed)
    whole, mixed = (plan(found, speedup=2.0, per_head=each, costs=costs) for each in (False, True))
    assert (mixed.rel_error or 0) <= (whole.rel_error or 0)
    assert any(row.mechanism == "by_head" for row in mixed.rows)
    assert any(a.mechanism == "by_head" for row in mixed.rows for a in row.alternatives)
    assert from_json(Plan, to_json(mixed)) == mixed
    assert "by_head (" in str(mixed)


def test_the_model_is_sped_up_by_what_attention_takes_of_it() -> None:
    found = audited(4, 5)
    costs = table(found, 5)
    decided = plan(found, speedup=1.25, of="model", model_ms=100.0, costs=costs)
    assert decided.attention_ms is not None
    assert 60 + decided.attention_ms <= 80.0 + 1e-6
    assert decided.model_speedup == pytest.approx(100 / (60 + decided.attention_ms))
    assert decided.rel_error == pytest.approx(min(e for t, e, *_ in everything(found, costs) if t <= 20))
    with pytest.raises(OptionError, match=r"makes the model 3 times.*the fastest makes it 1\.\d\d times as fast"):
        plan(found, speedup=3.0, of="model", model_ms=100.0, costs=costs)
    with pytest.raises(OptionError, match="less than the 40 ms of its attention"):
        plan(found, speedup=3.0, of="model", model_ms=30.0, costs=costs)


def test_a_budget_that_no_plan_keeps_is_told_with_the_best() -> None:
    found = audited(3, 6)
    costs = table(found, 6)
    with pytest.raises(OptionError, match=r"attention 100 times as fast at 4096 tokens; the fastest") as raised:
        plan(found, speedup=100.0, costs=costs)
    best = float(str(raised.value).split("a speedup up to ")[1].split(",")[0])
    assert plan(found, speedup=best, costs=costs).attention_speedup == pytest.approx(best, abs=0.011)
    with pytest.raises(OptionError, match=r"within a tolerance of 0\.01; the fastest makes it 1\.00 times"):
        plan(found, speedup=1.5, tolerance=0.01, costs=costs)
    with pytest.raises(OptionError, match="at least 2 layers of linear cost, and 0 of 3"):
        plan(found, min_layers=2, tolerance=0.01, costs=costs)


def test_without_sensitivities_all_layers_weigh_alike() -> None:
    found = audited(3, 7, sensitive=False)
    decided = plan(found, speedup=1.5, costs=table(found, 7))
    assert not decided.predicts_output
    assert decided.rel_error == pytest.approx(math.sqrt(sum((r.rel_error or 0) ** 2 for r in decided.rows) / 3))


def test_layers_that_share_their_weights_cost_once_for_each_call() -> None:
    found = audited(2, 8)
    shared = replace(found, layers=(replace(found.layers[0], calls=12), found.layers[1]))
    decided = plan(shared, tolerance=0.9, costs=table(found, 8))
    assert decided.exact_attention_ms == pytest.approx(13 * 10)
    assert decided.rows[0].exact_latency_ms == pytest.approx(10)


def test_layers_that_cannot_be_converted_are_told() -> None:
    found = audited(2, 9)
    refused = LayerAudit("c", 4, 4, 8, 0, (), None, (), (), refused="it is cross-attention")
    decided = plan(replace(found, layers=(*found.layers, refused)), speedup=1.2, costs=table(found, 9))
    assert decided.rows[2].reason == "stays exact: it is cross-attention"
    assert "1 layers cannot be converted" in decided.notes[0]
    assert decided.predicts_output


def test_extrapolated_costs_are_told() -> None:
    found = audited(2, 9)
    notes = plan(found, speedup=1.2, costs=table(found, 9, extrapolated={"softmax": 1024})).notes
    assert "1024 tokens or more and extrapolated to 4096" in notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 1.0}, "speed-up above 1"),
        ({"speedup": -3.0}, "speed-up above 1"),
        ({"speedup": math.nan}, "speed-up above 1"),
        ({"speedup": math.inf}, "speed-up above 1"),
        ({"speedup": 2.0, "of": "all"}, "of 'attention' or of the 'model', got 'all'"),
        ({"speedup": 2.0, "of": "model"}, "needs model_ms"),
        ({"model_ms": 0.0}, "model_ms as a positive number"),
        ({"min_layers": 4}, "min_layers from 0 to the 3 layers"),
        ({"max_layers": -1}, "max_layers from 0 to the 3 layers"),
        ({"min_layers": 2, "max_layers": 1}, "max_layers of at least min_layers"),
        ({"costs": "guessed"}, "got 'guessed'"),
        ({"length": 512, "costs": Table({})}, "wanted costs at 512 tokens, got those at 4096"),
        ({"speedup": 2.0, "of": "model", "model_ms": 9.0, "costs": "operations"}, "needs measured costs"),
    ],
)
def test_budgets_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan(audited(3), **options)


def test_an_earlier_audit_has_no_errors_to_mix_by() -> None:
    found = audited(1)
    earlier = replace(found, layers=(replace(found.layers[0], energy_by_head=()),))
    with pytest.raises(InputError, match="how much each head carries"):
        plan(earlier, per_head=True, costs=table(found))


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    row = (
        '{"layer": "a", "mechanism": "window", "config": {"window": 8}, "rel_error": 0.1, "reason": "", "best_linear": '
        '"window", "best_linear_config": {}, "best_linear_rel_error": 0.1, "alternatives": [{"mechanism": "window", '
        '"config": {}, "rel_error": 0.1, "relative_cost": 0.5, "within_tolerance": true, "note": ""}], "num_heads": 4, '
        '"head_dim": 8}'
    )
    (tmp_path / "old.json").write_text(f'{{"tolerance": 0.1, "length": 512, "rows": [{row}], "audited": "BertModel"}}')
    old = load_plan(tmp_path / "old.json")
    assert (old.linear_share, old.costs, old.attention_speedup, old.frontier) == (1.0, "operations", None, ())
    assert "window" in str(old)
    save_plan(old, tmp_path / "new.json")
    assert load_plan(tmp_path / "new.json") == old
