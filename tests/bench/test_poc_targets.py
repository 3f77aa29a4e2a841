"""The script that checks the targets: how it judges, on figures that are made up."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from maclin.bench import break_even, environment, result_path, targets_table
from maclin.records import Audit, LayerAudit, MechanismError, Timing


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "poc_targets.py"
    spec = importlib.util.spec_from_file_location("poc_targets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["poc_targets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def timing(subject: str, length: int, latency_ms: float | None) -> Timing:
    return Timing(subject, "attention", length, latency_ms, reason="refused" if latency_ms is None else None)


@pytest.mark.parametrize(
    ("latencies", "met", "measured"),
    [
        ((5.0, 9.0, 10.0), [True, True], ["1024 tokens", "16.0 times"]),
        ((3.0, 9.0, 10.1), [True, False], ["512 tokens", "15.8 times"]),
        ((5.0, 11.0, 10.0), [False, True], ["8192 tokens", "16.0 times"]),
        ((5.0, 11.0, 161.0), [False, False], ["never", "1.0 times"]),
        ((None, None, None), [False, False], ["refused", "refused"]),
    ],
)
def test_speed(targets: ModuleType, latencies: tuple[float | None, ...], met: list[bool], measured: list[str]) -> None:
    lengths = (512, 1024, 8192)
    rows = [timing("softmax", n, ms) for n, ms in zip(lengths, (4.0, 10.0, 160.0), strict=True)]
    rows += [timing("efficient", n, ms) for n, ms in zip(lengths, latencies, strict=True)]
    found = targets.speed_targets(rows, break_even(rows, "attention"))
    assert [target.met for target in found] == met
    assert [target.measured for target in found] == measured
    lines = targets_table(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ok" if ok else "MISSED" for ok in met]


def stored_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    phi_q, phi_k = q.softmax(-1), k.softmax(-2)
    return phi_q @ (phi_k.mT @ v)


@pytest.mark.parametrize("stored", [False, True])
def test_memory_that_grows_with_the_features_is_found(
    targets: ModuleType, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    monkeypatch.setattr(targets, "MEMORY_LENGTHS", (2048, 4096))
    if stored:
        monkeypatch.setattr(targets, "build", lambda name: stored_features)
    target = targets.memory_target("efficient")
    assert target.met is not stored, target


def test_the_file_is_named_by_date_and_hardware() -> None:
    where = environment()
    path = result_path(Path("results"), "poc-targets", where)
    assert path.parent == Path("results")
    assert path.name.startswith(f"poc-targets_{where.date_utc[:10]}_")
    assert path.name.endswith(f"-{where.num_threads}-threads.json")


@pytest.mark.parametrize(
    ("errors", "measured", "met"),
    [
        ([(0.4, 0.8), (0.5, 0.5)], "0.707, worst 1.000", True),
        ([(0.1, 0.8), (0.51, 0.5)], "0.357, worst 1.020", False),
        ([(0.4, 0.5), (0.4, 0.5)], "0.800, worst 0.800", False),
    ],
)
def test_the_error_is_compared_layer_by_layer(
    targets: ModuleType, errors: list[tuple[float, float]], measured: str, met: bool
) -> None:
    layers = tuple(
        LayerAudit(
            str(i),
            1,
            1,
            8,
            10,
            (),
            1.0,
            (1.0,),
            (MechanismError("revisited_linformer", {}, ours), MechanismError("linformer", {}, theirs)),
        )
        for i, (ours, theirs) in enumerate(errors)
    )
    target = targets.error_target(Audit(layers, 512, 3))
    assert (target.measured, target.met) == (measured, met)
