"""``bench``: everything is measured, wrong results are refused, and what is counted agrees with the tensors."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

import maclin
from maclin.bench import BenchJob, bench
from maclin.bench.run import growth
from maclin.core.mechanisms.efficient import Efficient
from maclin.records import BenchResult, BenchRow, Timing, from_json, to_json


def figures(result: BenchResult, subject: str) -> list[BenchRow]:
    return [row for row in result.rows if row.timing.subject == subject]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_every_subject_at_every_length(tiny: BenchJob, causal: bool, backward: bool) -> None:
    result = bench(dataclasses.replace(tiny, causal=causal, backward=backward))
    assert from_json(BenchResult, to_json(result)) == result
    assert {row.timing.subject for row in result.rows} == {"softmax", "efficient", "mean"}
    assert [row.timing.length for row in figures(result, "efficient")] == [16, 32, 64]
    for row in result.rows:
        assert row.timing.reason is None
        assert row.timing.latency_ms is not None
        assert row.timing.latency_ms > 0
        assert row.share_of_floor is not None
        assert row.share_of_floor > 0
        one = 2 * row.timing.length * 8 * 4  # a tensor of 2 heads of 8
        assert row.tensor_bytes == (8 if backward else 4) * one
        assert row.given_bytes == (4 if backward else 3) * one
        assert row.timing.peak_bytes is not None
        assert row.timing.peak_bytes >= one
    assert {row.kind for row in figures(result, "mean")} == {"baseline"}
    assert result.rates is not None
    assert {row.subject for row in result.growth} == {"softmax", "efficient", "mean"}


def test_wrong_results_have_no_speed(tiny: BenchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Efficient._bidirectional

    def wrong(self: Efficient, *args: Any) -> torch.Tensor:
        return 1.01 * right(self, *args)

    monkeypatch.setattr(Efficient, "_bidirectional", wrong)
    result = bench(tiny)
    for row in figures(result, "efficient"):
        assert (row.timing.latency_ms, row.timing.peak_bytes) == (None, None)
        assert row.timing.reason is not None
        assert "efficient is off its oracle by 0.01" in row.timing.reason
    assert all(row.timing.latency_ms for row in figures(result, "mean"))


def test_wrong_gradients_have_no_speed(tiny: BenchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Efficient._bidirectional

    def wrong(self: Efficient, q: torch.Tensor, k: torch.Tensor, *args: Any) -> torch.Tensor:
        return right(self, q, k.detach(), *args)  # the same numbers, no gradient of k

    monkeypatch.setattr(Efficient, "_bidirectional", wrong)
    assert all(row.timing.latency_ms for row in figures(bench(tiny), "efficient"))
    for row in figures(bench(dataclasses.replace(tiny, backward=True)), "efficient"):
        assert row.timing.reason is not None
        assert "in the gradient of k" in row.timing.reason


def test_what_fails_in_the_check_is_refused_and_the_others_go_on(
    tiny: BenchJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Efficient, "_bidirectional", broken)
    result = bench(tiny)
    assert {row.timing.reason for row in figures(result, "efficient")} == {
        "efficient fails where it is compared with its oracle: RuntimeError: no such kernel"
    }
    assert all(row.timing.latency_ms for row in figures(result, "softmax"))


def test_memory_is_measured_without_time(tiny: BenchJob) -> None:
    result = bench(dataclasses.replace(tiny, what="memory"))
    for row in result.rows:
        assert row.timing.latency_ms is None
        assert row.timing.reason is None
        assert row.timing.peak_bytes
    assert not result.break_even
    assert {row.quantity for row in result.growth} == {"memory"}


def test_a_step_holds_the_gradients(tiny: BenchJob) -> None:
    # of softmax: out, the gradients of q, k and v, and the log-sum-exp of each row at least
    result = bench(dataclasses.replace(tiny, what="memory", backward=True, lengths=(256,)))
    row = figures(result, "softmax")[0]
    assert row.timing.peak_bytes is not None
    assert row.tensor_bytes is not None
    assert row.timing.peak_bytes >= row.tensor_bytes // 2


def test_decoding_keeps_a_state_of_one_size(tiny: BenchJob) -> None:
    job = dataclasses.replace(tiny, what="decode", mechanisms="elu,window:window=4", lengths=(8, 32))
    result = bench(job)
    states = {(row.timing.subject, row.timing.length): row.given_bytes for row in result.rows}
    assert states["elu", 8] == states["elu", 32] == 4 * (2 * 8 * 8 + 2 * 8 + 1)  # kv, z and the count
    assert states["softmax", 32] == 4 * (states["softmax", 8] or 0) == 2 * 2 * 32 * 8 * 4
    assert states["window:window=4", 8] == states["window:window=4", 32]
    assert all(row.timing.latency_ms and row.floor for row in result.rows)


def test_decoding_continues_what_was_read_in() -> None:
    """The state at a position is that of one causal call over all tokens before it, whatever the chunks."""
    from maclin.bench import decode

    job = BenchJob("decode", "elu", (3, 7, 12), num_heads=2, head_dim=8, device="cpu")
    mech = maclin.mechanism("elu", head_dim=8, num_heads=2)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1, 2, n, 8, generator=generator) for n in (3, 3, 4, 4, 5, 5)]
    k, v = torch.cat(parts[::2], 2), torch.cat(parts[1::2], 2)
    _, wanted = mech(k, k, v, is_causal=True, return_state=True)
    found = decode._states(job, mech)[12]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_peer_that_is_missing_says_how_to_get_it(tiny: BenchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nystrom_attention", None)
    result = bench(dataclasses.replace(tiny, peers=True, only_peers=("nystrom-attention", "flash-linear-attention")))
    assert any("pip install nystrom-attention" in text for text in result.warnings)
    assert any("runs on a CUDA device only" in text for text in result.warnings)


def test_growth_is_fitted_to_the_long_lengths() -> None:
    def row(length: int, ms: float) -> BenchRow:
        return BenchRow(Timing("a", "attention", length, ms, peak_bytes=length**2), "mechanism")

    rows = [row(16, 1.0), row(1024, 1.0), row(2048, 2.0), row(4096, 4.0)]
    time, memory = growth(rows)
    assert (time.quantity, time.from_length, time.to_length) == ("time", 1024, 4096)
    assert time.exponent == pytest.approx(1.0)
    assert memory.exponent == pytest.approx(2.0)
    assert growth(rows[:2]) == []
