"""Break-even lengths: measured once per device, kept, and read by core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maclin.bench import BenchJob, dispatch, measure_break_even
from maclin.bench.dispatch import keep
from maclin.core.break_even import (
    DEFAULTS,
    IN_TORCH,
    BreakEvenKey,
    break_even_length,
    cache_path,
    device_name,
    measured_lengths,
)
from maclin.core.errors import MaclinError, OptionError
from maclin.core.native import use_native, wait_for_kernels
from maclin.records import BenchResult, BreakEven, Timing

KEY = BreakEvenKey("elu", "a processor, 2 threads", "float32", 64, 8)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MACLIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "break_even.json"


@pytest.fixture
def bench_runs(monkeypatch: pytest.MonkeyPatch, result: BenchResult) -> list[BenchJob]:
    """Every job that is measured; the result says 512 for elu, and that favor is wrong."""
    jobs: list[BenchJob] = []

    def bench(job: BenchJob, progress: object = None) -> BenchResult:
        import dataclasses

        jobs.append(job)
        found = (BreakEven("elu", "attention", 512, ""), BreakEven("favor", "attention", None, ""))
        wrong = dataclasses.replace(result.rows[0], timing=Timing("favor", "attention", 64, None, reason="it is red"))
        return dataclasses.replace(result, break_even=found, rows=(*result.rows, wrong))

    monkeypatch.setattr(dispatch, "bench", bench)
    return jobs


def test_measured_once_and_kept(path: Path, bench_runs: list[BenchJob]) -> None:
    key, length, found = measure_break_even("elu", device="cpu", causal=True)
    assert (length, len(bench_runs)) == (512, 1)
    assert found is not None
    assert bench_runs[0].causal
    assert f"{torch.get_num_threads()} threads" in key.device
    assert measure_break_even("elu", device="cpu", causal=True) == (key, 512, None)
    assert len(bench_runs) == 1
    measure_break_even("elu", device="cpu", causal=True, again=True)
    measure_break_even("elu", device="cpu")  # another key
    assert len(bench_runs) == 3
    assert cache_path() == path
    assert len(measured_lengths()) == 2
    assert break_even_length(key, "cpu") == 512


def test_wrong_results_have_no_break_even(path: Path, bench_runs: list[BenchJob]) -> None:
    with pytest.raises(MaclinError, match="it is red"):
        measure_break_even("favor", device="cpu")
    assert not path.exists()
    with pytest.raises(OptionError, match="unknown mechanism"):
        measure_break_even("nothing", device="cpu")


@pytest.mark.usefixtures("path")
def test_without_a_measurement_there_is_a_default() -> None:
    assert break_even_length(KEY, "cpu") == DEFAULTS["cpu" if wait_for_kernels() else IN_TORCH][False]
    assert (
        break_even_length(BreakEvenKey("elu", "a", "float32", 64, 8, is_causal=True), "cuda") == DEFAULTS["cuda"][True]
    )
    assert break_even_length(KEY, "abacus") == DEFAULTS[IN_TORCH][False]


@pytest.mark.usefixtures("path")
def test_without_kernels_linear_attention_pays_later() -> None:
    use_native(False)
    try:
        assert break_even_length(KEY, "cpu") == DEFAULTS[IN_TORCH][False] > DEFAULTS["cpu"][False]
        assert device_name("cpu").endswith("threads, in torch")
    finally:
        use_native(True)
    if wait_for_kernels():
        assert device_name("cpu").endswith("threads")


def test_never_is_kept_as_never(path: Path) -> None:
    keep({str(KEY): None, "other": 64}, path)
    assert break_even_length(KEY, "cpu") is None
    keep({"other": 128}, path)
    assert measured_lengths() == {str(KEY): None, "other": 128}
    assert [file.name for file in path.parent.iterdir()] == ["break_even.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"lengths": 3}', '{"lengths": {"a": "b", "b": -1, "c": true, "d": 1.5}}', "\0\xff"]
)
def test_a_damaged_cache_is_an_empty_one(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    assert measured_lengths() == {}
    keep({"a": 1}, path)
    assert measured_lengths() == {"a": 1}


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MaclinError, match="set MACLIN_CACHE to another folder"):
        keep({"a": 1}, tmp_path / "file" / "break_even.json")


def test_different_questions_have_different_keys() -> None:
    keys = [
        KEY,
        BreakEvenKey("favor", "a processor, 2 threads", "float32", 64, 8),
        BreakEvenKey("elu", "a processor, 4 threads", "float32", 64, 8),
        BreakEvenKey("elu", "a processor, 2 threads", "bfloat16", 64, 8),
        BreakEvenKey("elu", "a processor, 2 threads", "float32", 32, 8),
        BreakEvenKey("elu", "a processor, 2 threads", "float32", 64, 4),
        BreakEvenKey("elu", "a processor, 2 threads", "float32", 64, 8, is_causal=True),
        BreakEvenKey("elu", "a processor, 2 threads", "float32", 64, 8, backward=True),
    ]
    assert len({str(key) for key in keys}) == len(keys)
