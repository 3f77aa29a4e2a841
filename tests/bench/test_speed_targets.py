"""The script that checks the targets for speed: how it judges, on figures that are made up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from maclin.bench import BenchJob, Target, not_measured, ratio_target, result_path, targets_table, why
from maclin.records import SCHEMA_VERSION, BenchResult, BenchRow, BreakEven, Environment, Floor, Rates, Timing

MACHINE = Environment("2026-01-31", "0", "3.11", "2.13", None, "linux", "A CPU", "cpu", 2, "float32")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "speed_targets.py"
    spec = importlib.util.spec_from_file_location("speed_targets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed_targets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def row(subject: str, length: int, ms: float | None, matrix_ms: float = 1.0, reason: str | None = None) -> BenchRow:
    timing = Timing(subject, "attention", length, ms, peak_bytes=100, reason=reason)
    return BenchRow(timing, "mechanism", Floor(1, 1000, 0.1, matrix_ms), 3, 4)


def made(*rows: BenchRow, warnings: tuple[str, ...] = ()) -> BenchResult:
    found = (BreakEven("own", "attention", 384, "a note"),)
    rates = Rates(1e10, 1e12, 1, "", "float32")
    return BenchResult(SCHEMA_VERSION, "speed", MACHINE, {}, rates, rows, break_even=found, warnings=warnings)


@pytest.mark.parametrize(("own", "met"), [(1.0, True), (1.01, False), (None, None)])
def test_a_ratio_is_met_missed_or_not_measured(own: float | None, met: bool | None) -> None:
    result = made(row("softmax", 64, 12.0), row("own", 64, own, reason=None if own else "it is red"))
    found = ratio_target(result, "own: faster", "own", 64, 12.0)
    assert found.met is met
    assert found.how == "it is red" if own is None else found.measured.endswith("times")
    assert found.verdict == {True: "ok", False: "MISSED", None: "not measured"}[met]


def test_why_a_figure_is_missing() -> None:
    result = made(row("own", 64, None, reason="red"), warnings=("performer-pytorch cannot be imported", "busy"))
    assert why(result, 64, "own", "softmax") == "red"
    assert why(result, 128, "own") == "this length was not asked for"
    assert why(result, 64, "performer-pytorch (pip)") == "performer-pytorch cannot be imported"


def test_the_share_counts_what_the_mechanism_needs(script: ModuleType) -> None:
    length = 4096
    result = made(row(script.RAW, length, 1.0, matrix_ms=0.79), row("favor", length, 1.0, matrix_ms=0.8))
    raw, favor = (script.share_target(result, name, length) for name in (script.RAW, "favor"))
    assert (raw.met, favor.met) == (False, True)
    assert raw.measured == "79 %"
    # 2 operations x 8 heads x (N + S) tokens x 64 x (144 projections + 128 features), at 1e12 a second, of 1 ms
    share = 2 * 8 * 2 * length * 64 * (144 + 128) / 1e12 / 1e-3
    assert f"{100 * share:.0f} % with 144 random projections" in raw.how
    assert "144" not in favor.how


def test_the_split_is_what_the_targets_are_about(script: ModuleType) -> None:
    mechs, _ = BenchJob(mechanisms=",".join(script.OURS), device="cpu").built()
    for mech in mechs.values():
        assert mech.config["counts"] == [1, 64, 45, 18]
        assert mech.config["estimator"] == "stratified"
    assert [mech.config["ppsbn"] for mech in mechs.values()] == [False, "token"]
    # N / 272: exact attention over what the split needs with 144 random projections, per head and query
    needed = 2 * script.HEAD_DIM * (script.PROJECTIONS + script.NUM_FEATURES)
    assert needed == 2 * script.HEAD_DIM * 272


def test_every_row_has_a_verdict_on_a_machine_without_a_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[BenchJob] = []

    def bench(job: BenchJob) -> BenchResult:
        jobs.append(job)
        rows = [row(name.text, n, 1.0) for name in job.specs for n in job.points]
        rows += [row(name, n, 1000.0) for name in ("softmax", script.PERFORMER) for n in job.points]
        return made(*rows)

    monkeypatch.setattr(script, "bench", bench)
    monkeypatch.setattr(script, "bf16_errors", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(script, "BF16_LENGTH", 32)
    monkeypatch.setattr(script, "has_bf16_units", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    script.main(["--threads", "1", "--longest", "65536", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if line.startswith(("ok", "MISSED", "not measured"))]
    assert len([line for line in verdicts if line.startswith("not measured") and "H200" in line]) == 4
    assert any("growth exponent" in line and "this length was not asked for" in line for line in verdicts)
    assert any("this processor has no bf16 units" in line for line in verdicts)
    assert any(line.startswith("ok") and "against performer-pytorch, 16,384" in line for line in verdicts)
    assert max(max(job.points) for job in jobs) == 65536
    assert [job.what for job in jobs] == ["speed", "speed", "speed", "decode", "memory", "memory", "speed"]
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("speed-targets_")
    record = json.loads(written.read_text())
    assert len(record["targets"]) == len(verdicts)
    assert set(record["results"]) == {
        "forward", "backward", "causal", "decode", "memory", "memory-backward", "growth"
    }  # fmt: skip


def test_bf16_error_is_that_of_the_mechanism(script: ModuleType) -> None:
    (mech,) = BenchJob(mechanisms=script.DEFAULT, device="cpu", dtype="bfloat16").built()[0].values()
    qkv = tuple(x.bfloat16() for x in torch.randn(3, 1, 8, 64, 64, generator=torch.Generator().manual_seed(0)))
    own, naive = script.bf16_errors(mech, qkv)
    assert 0 < own < 0.05
    assert 0 < naive < 0.05

    def louder(module: torch.nn.Module, args: Any, out: Any) -> Any:
        return 1.5 * out

    mech.register_forward_hook(louder)
    assert script.bf16_errors(mech, qkv)[0] == pytest.approx(0.5, rel=0.1)


def test_a_processor_says_whether_it_has_bf16_units(script: ModuleType, tmp_path: Path) -> None:
    for text, wanted in (("flags: sse amx_bf16", True), ("flags: avx512_bf16", True), ("flags: avx2", False)):
        (tmp_path / "cpuinfo").write_text(text)
        assert script.has_bf16_units(tmp_path / "cpuinfo") is wanted
    assert script.has_bf16_units(tmp_path / "none") is False


def test_the_table_and_the_name_of_the_file() -> None:
    lines = targets_table([Target("a", "1", "2", False, "how"), not_measured("b", "3", "why")]).splitlines()
    assert [line[:13].strip() for line in lines[1:]] == ["MISSED", "not measured"]
    path: Any = result_path(Path("results"), "speed", MACHINE)
    assert path == Path("results/speed_2026-01-31_a-cpu-2-threads.json")
