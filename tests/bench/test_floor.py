"""The least time of a call: rates that are measured, bytes and operations that are counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import maclin
from maclin.bench.floor import attention_flops, best_of, floor, measure_rates, moved_bytes, tensor_bytes
from maclin.records import BenchRow, Rates, Timing

SIZES: dict[str, Any] = {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "itemsize": 4}


def test_the_larger_of_both_times_is_the_floor() -> None:
    rates = Rates(1e9, 1e12, 1, "", "float32")
    found = floor(2_000_000, 1_000_000_000, rates)
    assert found.copy_ms == pytest.approx(2.0)
    assert found.matrix_ms == pytest.approx(1.0)
    assert found.ms == pytest.approx(2.0)
    row = BenchRow(Timing("a", "attention", 1, 8.0, peak_bytes=10), "mechanism", found, given_bytes=3, tensor_bytes=4)
    assert row.share_of_floor == pytest.approx(0.25)
    assert row.matrix_share == pytest.approx(0.125)
    assert row.beyond_bytes == 9


def test_what_has_no_figure_has_no_share() -> None:
    row = BenchRow(Timing("a", "attention", 1, None, reason="red"), "mechanism")
    assert (row.share_of_floor, row.matrix_share, row.beyond_bytes) == (None, None, None)


@pytest.mark.parametrize(
    ("is_causal", "backward", "factor"),
    [(False, False, 1.0), (False, True, 3.0), (True, False, 0.5), (True, True, 1.5)],
)
def test_operations_of_exact_attention(is_causal: bool, backward: bool, factor: float) -> None:
    mech = maclin.mechanism("softmax", head_dim=8, num_heads=4)
    found = attention_flops(mech, 1000, batch=2, is_causal=is_causal, backward=backward)
    pairs = 1000 * 1000 if not is_causal else 1000 * 1001 // 2
    assert found == 2 * 2 * 4 * pairs * (8 + 8) * (3 if backward else 1)
    assert found == pytest.approx(factor * 2 * 2 * 4 * 1000**2 * 16, rel=1e-3)


def test_operations_of_a_feature_map_are_linear_and_the_same_for_causal() -> None:
    mech = maclin.mechanism("elu", head_dim=8, num_heads=4)
    one, two = attention_flops(mech, 100), attention_flops(mech, 200)
    assert two == 2 * one
    assert attention_flops(mech, 100, is_causal=True) == one
    # phi is made without products; 2 tokens x 8 features x (8 values + 1) for 4 heads, 2 operations each
    assert one == 2 * 4 * 200 * 8 * 9


def test_bytes_by_the_tensors_themselves() -> None:
    q, out = torch.empty(2, 4, 10, 8), torch.empty(2, 4, 10, 8)
    k, v = torch.empty(2, 2, 2, 10, 8)
    forward = q.nbytes + k.nbytes + v.nbytes + out.nbytes
    assert tensor_bytes(10, **SIZES) == moved_bytes(10, **SIZES) == forward
    assert tensor_bytes(10, **SIZES, backward=True) == 2 * forward
    # backward: q, k, v and the gradient of out are read, the gradients of q, k, v are written
    assert moved_bytes(10, **SIZES, backward=True) == forward + 2 * (q.nbytes + k.nbytes + v.nbytes) + out.nbytes


def test_rates_are_the_best_of_what_was_tried() -> None:
    now = [0.0]

    def clock() -> float:  # every look takes a millisecond: two of them around each call
        now[0] += 1e-3
        return now[0]

    found = measure_rates(copied_bytes=(4000, 8000), shapes=((1, 4, 4, 4), (2, 8, 8, 8)), seconds=0.0, clock=clock)
    assert found.copied_bytes == 8000
    assert found.copy_bytes_per_s == pytest.approx(2 * 8000 / 1e-3)
    assert found.matrix_shape == "2 x (8, 8) @ (8, 8)"
    assert found.matrix_flops_per_s == pytest.approx(2 * 2 * 8**3 / 1e-3)


def test_two_measurements_are_merged_by_the_best_of_each() -> None:
    merged = best_of(Rates(1.0, 5.0, 1, "a", "float32"), Rates(2.0, 4.0, 2, "b", "float32"))
    assert merged == Rates(2.0, 5.0, 2, "a", "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_has_rates(dtype: torch.dtype) -> None:
    found = measure_rates(dtype, copied_bytes=(2**16,), shapes=((1, 64, 64, 64),), seconds=0.01)
    assert found.copy_bytes_per_s > 1e6
    assert found.matrix_flops_per_s > 1e6
    assert found.dtype == str(dtype).removeprefix("torch.")
