import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from maclin.adopt import frontier_order, load_plan, relative_cost, save_plan
from maclin.adopt import plan as planned
from maclin.core import mechanisms
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.records import Audit, LayerAudit, MechanismError, Plan, from_json, to_json

plan = partial(planned, costs="operations")


def layer(name: str, refused: str | None = None, **errors: float | None) -> LayerAudit:
    found = tuple(
        MechanismError(mechanism, {}, error, reason=None if error is not None else "it has no causal form")
        for mechanism, error in errors.items()
    )
    return LayerAudit(name, 4, 4, 32, 100, (), 0.8, (0.8,) * 4, found, refused)


def audited(*layers: LayerAudit, length: int = 4096) -> Audit:
    return Audit(layers, length, 20, architecture="BertModel")


def test_the_cheapest_within_the_tolerance_wins() -> None:
    row = plan(audited(layer("a", window=0.02, elu=0.09, favor=0.05, rfa=0.3)), tolerance=0.1).rows[0]
    costs = {a.mechanism: a.relative_cost for a in row.alternatives}
    assert row.mechanism == "elu"
    assert costs["elu"] == min(costs[name] or 1 for name in ("window", "elu", "favor"))
    assert (row.rel_error, row.best_linear, row.best_linear_rel_error) == (0.09, "window", 0.02)
    assert [a.mechanism for a in row.alternatives] == ["window", "favor", "elu", "rfa"]
    assert [a.within_tolerance for a in row.alternatives] == [True, True, True, False]


def test_a_layer_stays_exact_where_nothing_is_within_the_tolerance() -> None:
    decided = plan(audited(layer("a", window=0.11, elu=0.5), layer("b", elu=0.05)), tolerance=0.1)
    row = decided.rows[0]
    assert (row.mechanism, row.config, row.rel_error) == ("softmax", {}, 0.0)
    assert "window, is at 0.11" in row.reason
    assert decided.linear_share == 0.5


def test_what_is_not_cheaper_is_not_chosen() -> None:
    row = plan(audited(layer("a", window=0.01)), tolerance=0.1, length=64).rows[0]
    assert row.mechanism == "softmax"
    assert "not cheaper" in row.reason
    assert "64 tokens" in row.alternatives[0].note
    assert plan(audited(layer("a", window=0.01)), tolerance=0.1, length=8192).rows[0].mechanism == "window"


def test_baselines_are_shown_but_never_chosen() -> None:
    found = audited(layer("a", mean=0.01, softmax=0.0, elu=0.09))
    row = plan(found, tolerance=0.1).rows[0]
    assert row.mechanism == row.best_linear == "elu"
    assert {a.mechanism for a in row.alternatives if "baseline" in a.note} == {"mean", "softmax"}
    assert [step.mechanism for step in frontier_order(found)] == ["elu"]


def test_refused_layers_stay_exact() -> None:
    found = audited(layer("a", refused="it is cross-attention"), layer("b", linformer=None))
    first, second = plan(found, tolerance=0.1).rows
    assert "cross-attention" in first.reason
    assert "no mechanism of linear cost" in second.reason
    assert second.alternatives[0].note == "it has no causal form"
    assert (first.best_linear, second.best_linear_rel_error) == (None, None)
    assert frontier_order(found) == []


def test_the_frontier_is_least_harmful_first() -> None:
    found = audited(layer("a", elu=0.5, window=0.4), layer("b", elu=0.2, mean=0.1), layer("c", refused="no"))
    steps = [(s.layer, s.mechanism, s.rel_error) for s in frontier_order(found)]
    assert steps == [("b", "elu", 0.2), ("a", "window", 0.4)]


def test_the_frontier_prefers_what_saves_at_the_length() -> None:
    wide = MechanismError("macformer", {"ppsbn": False, "num_features": 256}, 0.14)
    row = LayerAudit("a", 4, 4, 32, 100, (), 0.8, (0.8,) * 4, (wide, MechanismError("elu", {}, 0.17)))
    assert relative_cost("macformer", wide.config, row, 256) > 1 > relative_cost("macformer", wide.config, row, 4096)
    assert [frontier_order(audited(row, length=n))[0].mechanism for n in (256, 4096)] == ["elu", "macformer"]
    alone = LayerAudit("a", 4, 4, 32, 100, (), 0.8, (0.8,) * 4, (wide,))
    assert frontier_order(audited(alone, length=256))[0].mechanism == "macformer"  # better than no point at all


def test_relative_cost_falls_with_length() -> None:
    row = layer("a")
    for name in mechanisms.names():
        if mechanisms.row(name).linear:
            config: dict[str, Any] = {"projection": "mean-pool"} if name == "linformer" else {}
            assert relative_cost(name, config, row, 8192) < 1.1 * relative_cost(name, config, row, 2048) / 3.5
    assert relative_cost("softmax", {}, row, 100) == 1.0


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, 7, float("nan")])
def test_a_tolerance_outside_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan(audited(layer("a")), tolerance=tolerance)


def test_bad_lengths_and_empty_audits_are_refused() -> None:
    with pytest.raises(OptionError, match="length"):
        plan(audited(layer("a")), length=0)
    with pytest.raises(InputError, match="at least one layer"):
        plan(audited())


def test_a_plan_is_read_back_as_written(tmp_path: Path) -> None:
    decided = plan(audited(layer("a", window=0.02, linformer=None), layer("b", refused="no")))
    save_plan(decided, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == decided == from_json(Plan, to_json(decided))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_bad_plan_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"none\.json"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"tolerance": 0.1}')
    with pytest.raises(InputError, match=r"bad\.json: Plan: field 'length' is missing"):
        load_plan(tmp_path / "bad.json")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MaclinError, match="No space left on device"):
        save_plan(plan(audited(layer("a"))), tmp_path / "plan.json")
