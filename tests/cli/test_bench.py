"""The command ``maclin bench``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maclin.bench import run as bench_run
from maclin.bench.floor import measure_rates
from maclin.records import BenchResult
from maclin.report import load_bench, write_bench

Cli = Callable[..., tuple[int, str, str]]
TINY = ("--heads", "2", "--head-dim", "8", "--device", "cpu")


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(measure_rates, copied_bytes=(2**16,), shapes=((1, 64, 64, 64),), seconds=0.01)
    monkeypatch.setattr(bench_run, "measure_rates", lambda dtype, device: small(dtype, device))


@pytest.fixture
def speed(run_cli: Cli) -> Callable[..., tuple[int, str, str]]:
    def call(out: Path, *more: str) -> tuple[int, str, str]:
        return run_cli(
            "bench", "speed", *TINY, "--mechanisms", "mean,efficient", "--lengths", "16,32",
            "--seconds-per-point", "0.05", "--out", str(out), *more,
        )  # fmt: skip

    return call


def test_speed_writes_three_files_and_says_what_it_found(speed: Cli, tmp_path: Path) -> None:
    status, out, err = speed(tmp_path / "new")
    assert status == 0, err
    assert sorted(path.suffix for path in (tmp_path / "new").iterdir()) == [".html", ".json", ".md"]
    assert "At 32 tokens, efficient is the fastest" in out
    assert "Share of floor" in out
    assert "check against the oracles" in err
    status, out, err = speed(tmp_path / "new")
    assert status == 2
    assert "pass --force" in err
    status, out, err = speed(tmp_path / "new", "--force", "--json")
    assert status == 0
    assert "✓" not in err
    assert json.loads(out)["settings"]["mechanisms"] == ["mean", "efficient"]


def test_memory_and_decode(run_cli: Cli, tmp_path: Path) -> None:
    options = (*TINY, "--mechanisms", "elu", "--lengths", "8,16", "--out", str(tmp_path))
    assert run_cli("bench", "memory", *options, "--backward", "--quiet") == (0, "", "")
    status, out, _ = run_cli("bench", "decode", *options, "--seconds-per-point", "0.01")
    assert status == 0
    assert "Position" in out
    names = sorted(path.name.split("_")[0] for path in tmp_path.glob("*.json"))
    assert names == ["bench-decode", "bench-memory-backward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mechanisms", "sofmax"), "unknown mechanism 'sofmax'; known are softmax,"),
        (("--mechanisms", "favor:features=3"), "favor has no option 'features'"),
        (("--lengths", "12,x"), "wanted --lengths as whole numbers with commas"),
        (("--lengths", ","), "wanted lengths of at least 1 token"),
        (("--dtype", "int8"), "wanted a dtype of float32"),
        (("--heads", "0"), "wanted num_heads of at least 1"),
        (("--device", "tpu"), "wanted a device of auto, cpu or cuda"),
    ],
)
def test_a_wrong_call_is_explained(run_cli: Cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run_cli("bench", "speed", "--quiet", "--out", str(tmp_path / "new"), *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "new").exists()


def test_cuda_where_there_is_none(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run_cli("bench", "speed", "--device", "cuda", "--out", str(tmp_path / "new"))
    assert status == 2
    assert "sees no CUDA device; pass --device cpu" in err


def slower(result: BenchResult) -> BenchResult:
    def of(timing: Any) -> Any:
        fields = ("latency_ms", "latency_ms_low", "latency_ms_high")
        return dataclasses.replace(timing, **{name: 1e3 * getattr(timing, name) for name in fields})

    return dataclasses.replace(
        result, rows=tuple(dataclasses.replace(row, timing=of(row.timing)) for row in result.rows)
    )


def test_compare_leaves_with_1_where_something_regressed(speed: Cli, run_cli: Cli, tmp_path: Path) -> None:
    assert speed(tmp_path / "a", "--quiet")[0] == 0
    result = load_bench(tmp_path / "a")
    write_bench(slower(result), tmp_path / "b")
    status, out, _ = run_cli("bench", "compare", str(tmp_path / "a"), str(tmp_path / "a"))
    assert status == 0
    assert "nothing regressed" in out
    status, out, _ = run_cli("bench", "compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert status == 1
    assert out.count("| regressed") == 6  # three subjects at two lengths
    status, out, _ = run_cli("bench", "compare", str(tmp_path / "b"), str(tmp_path / "a"), "--json")
    assert status == 0
    assert {change["verdict"] for change in json.loads(out)["changes"]} == {"improved", "same"}
    status, _, err = run_cli("bench", "compare", str(tmp_path / "a"), str(tmp_path / "none"))
    assert status == 1
    assert "check the path" in err


def test_break_even_is_kept(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACLIN_CACHE", str(tmp_path))
    options = ("--mechanism", "mean", "--lengths", "16,32", "--seconds-per-point", "0.01", *TINY)
    status, out, err = run_cli("bench", "break-even", *options)
    assert status == 0, err
    assert "mean | " in out
    assert "measured now" in out
    status, out, _ = run_cli("bench", "break-even", *options, "--json")
    assert status == 0
    assert json.loads(out)["measured_now"] is False
    assert json.loads(out)["file"] == str(tmp_path / "break_even.json")


def test_help_without_a_command(run_cli: Cli) -> None:
    status, out, _ = run_cli("bench")
    assert status == 0
    for name in ("speed", "memory", "decode", "compare", "break-even"):
        assert name in out
