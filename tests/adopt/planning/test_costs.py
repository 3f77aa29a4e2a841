"""Costs as measured: what is measured, what is extrapolated, what is kept."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.adopt import measure_costs, plan
from maclin.adopt.planning import cost_bench
from maclin.adopt.planning.cost_bench import GATHER, Cost, CostBench, Subject
from maclin.adopt.planning.costs import Latencies, Operations
from maclin.core import mechanisms
from maclin.core.errors import MaclinError, OptionError
from maclin.records import Audit, LayerAudit, MechanismError


def audited(num_kv_heads: int = 4, **options: Any) -> Audit:
    errors = (
        MechanismError("window", {"window": 4}, 0.2, (0.2,) * 4),
        MechanismError("elu", {}, 0.4, (0.4,) * 4),
        MechanismError("linformer", {"seq_len": 4}, None, reason="too short"),
    )
    row = LayerAudit("a", 4, num_kv_heads, 8, 99, (), 0.9, (0.9,) * 4, errors)
    return Audit((replace(row, energy_by_head=(0.25,) * 4, **options),), 32, 20, device="cpu", dtype="float32")


def formula(subject: Subject) -> Callable[[int], float]:
    """Seconds of a subject at a length."""
    if subject.name == GATHER:
        return lambda n: 1e-8 * n
    if subject.name == "softmax":
        return lambda n: subject.num_heads * (2e-7 * n + 1e-9 * n * n)
    return lambda n: 1e-4 + subject.num_heads * 4e-7 * n


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Latencies by a formula; the runs, as name, heads and length."""
    runs: list[tuple[str, int, int]] = []

    def call(self: CostBench, subject: Subject) -> Any:
        return subject

    def seconds(self: CostBench, subject: Any, length: int) -> float:
        runs.append((subject.name, subject.num_heads, length))
        return formula(subject)(length)

    monkeypatch.setattr(CostBench, "_call", call)
    monkeypatch.setattr(CostBench, "_seconds", seconds)
    return runs


def test_everything_that_was_audited_is_measured_beside_exact_attention(tmp_path: Path) -> None:
    costs = measure_costs(audited(), per_head=True, path=tmp_path / "costs.json")
    layer = audited().layers[0]
    assert (costs.length, costs.kind) == (32, "measured")
    assert all(cost.value > 0 and cost.measured_length is None for cost in costs.measured.values())
    assert {subject.name for subject in costs.measured} == {"softmax", "window", "elu", GATHER}
    assert {subject.num_heads for subject in costs.measured if subject.name == "elu"} == {4, 1}
    with pytest.raises(MaclinError, match="linformer was not measured"):
        costs.of(layer, "linformer", {"seq_len": 4})
    plan(audited(), tolerance=0.5, per_head=True, costs=costs)


def test_what_was_measured_is_kept_and_what_is_new_is_scaled(
    tmp_path: Path, clockwork: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layer = tmp_path / "costs.json", audited().layers[0]
    first = measure_costs(audited(), path=path)
    wanted = 1e3 * formula(Subject.of(layer, "elu", {}))(32)
    assert first.of(layer, "elu", {}).value == pytest.approx(wanted)
    clockwork.clear()
    assert measure_costs(audited(), path=path).measured == first.measured
    assert clockwork == []
    more = replace(audited(), layers=(replace(layer, errors=(*layer.errors, MechanismError("favor", {}, 0.3))),))
    busy = CostBench._seconds  # the machine is twice as slow meanwhile
    monkeypatch.setattr(CostBench, "_seconds", lambda *args: 2 * busy(*args))
    second = measure_costs(more, path=path)
    assert {name for name, *_ in clockwork} == {"softmax", "favor"}
    assert second.of(layer, "softmax", {}) == first.of(layer, "softmax", {})
    assert second.of(layer, "favor", {}).value == pytest.approx(wanted)
    measure_costs(audited(), path=path, again=True)
    assert {name for name, *_ in clockwork} == {"softmax", "favor", "window", "elu"}


def test_other_lengths_and_sizes_are_measured_anew(tmp_path: Path, clockwork: list[tuple[str, int, int]]) -> None:
    path = tmp_path / "costs.json"
    measure_costs(audited(), path=path)
    for other in (replace(audited(), length=64), audited(is_causal=True), audited(2), audited(value_dim=5)):
        clockwork.clear()
        measure_costs(other, path=path)
        assert clockwork


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"latencies_ms": 3}', '{"latencies_ms": {"a": {"b": ["x", 3]}}}'])
def test_a_cache_that_cannot_be_read_or_written_is_none(
    tmp_path: Path, clockwork: list[tuple[str, int, int]], text: str
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert measure_costs(audited(), path=path).measured
    assert json.loads(path.read_text())["latencies_ms"]
    (tmp_path / "file").write_text("")
    assert measure_costs(audited(), path=tmp_path / "file" / "costs.json").measured


def test_long_runs_are_extrapolated_by_their_growth(tmp_path: Path, clockwork: list[tuple[str, int, int]]) -> None:
    layer, length = audited().layers[0], 1 << 20
    costs = measure_costs(audited(), length, path=tmp_path / "costs.json")
    for name, config in (("softmax", {}), ("elu", {}), ("window", {"window": 4})):
        exact = formula(Subject.of(layer, name, config))
        cost = costs.of(layer, name, config)
        assert cost.value == pytest.approx(1e3 * exact(length))
        assert cost.measured_length is not None
        assert exact(cost.measured_length) <= cost_bench.SECONDS_PER_RUN
        assert exact(4 * cost.measured_length) > cost_bench.SECONDS_PER_RUN  # what is fixed is taken to grow, too
    assert max(n for name, _, n in clockwork if name == "softmax") < max(n for name, _, n in clockwork if name == "elu")
    assert "extrapolated to 1048576" in plan(audited(), 0.5, length, costs=costs).notes[0]


def test_fewer_heads_lie_on_a_line(tmp_path: Path, clockwork: list[tuple[str, int, int]]) -> None:
    layer = audited().layers[0]
    costs = measure_costs(audited(), 64, per_head=True, path=tmp_path / "costs.json")
    for key_heads in (1, 2, 3, 4):
        part = formula(Subject.of(layer, "elu", {}, key_heads))
        assert costs.of(layer, "elu", {}, key_heads).value == pytest.approx(1e3 * part(64))
    assert costs.of(layer, "elu", {}, 0).value == pytest.approx(0.1)
    assert costs.of(layer, "softmax", {}, 0).value == pytest.approx(0.0, abs=1e-12)
    odd = Latencies(64, "", {**costs.measured, Subject.of(layer, "elu", {}, 1): Cost(99.0)})  # noise, not a line
    assert odd.of(layer, "elu", {}, 3).value == 99.0


def test_what_cannot_be_run_has_no_cost(tmp_path: Path) -> None:
    broken = replace(
        audited().layers[0], errors=(MechanismError("linformer", {"seq_len": 4}, 0.1), MechanismError("elu", {}, 0.2))
    )
    found = Audit((broken,), 32, 20)
    costs = measure_costs(found, path=tmp_path / "costs.json")
    decided = plan(found, tolerance=0.5, costs=costs)
    (one,) = (a for a in decided.rows[0].alternatives if a.mechanism == "linformer")
    assert (one.relative_cost, one.note) == (None, "linformer was not measured in the sizes of this layer")


def test_operations_are_those_of_the_mechanisms() -> None:
    costs, layer = Operations(1000), audited(2, value_dim=5).layers[0]
    made = mechanisms.mechanism("window", head_dim=8, num_heads=4, window=4)
    assert costs.of(layer, "window", {"window": 4}).value == 4 * made.cost(1000, 1000, 5)
    assert costs.of(layer, "window", {"window": 4}, 1).value == 2 * made.cost(1000, 1000, 5)
    assert costs.of(layer, "window", {"window": 4}, 0).value == costs.per_head(layer) == 0


def test_devices_and_lengths_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'cuda:77', which is not there"):
        measure_costs(audited(), device="cuda:77", path=tmp_path / "costs.json")
    with pytest.raises(OptionError, match="a device to measure on, got 'toaster'"):
        measure_costs(audited(), device="toaster", path=tmp_path / "costs.json")
    with pytest.raises(OptionError, match="at least 1 token, got 0"):
        measure_costs(audited(), 0, path=tmp_path / "costs.json")


def test_the_garbage_collector_goes_on_afterwards(tmp_path: Path) -> None:
    import gc

    assert gc.isenabled()
    measure_costs(audited(), path=tmp_path / "costs.json")
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()
