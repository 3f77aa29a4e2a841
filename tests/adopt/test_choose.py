"""Choosing for tensors: who wins, on which sequences, and what is handed over."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core.errors import InputError, OptionError
from maclin.core.reference import softmax_attention
from maclin.records import Choice, from_json, to_json

LONG: dict[str, Any] = {"length": 10**5}
RAW = ("macformer", {"ppsbn": False, "num_features": 24})


def tensors(batch: int = 6, heads: int = 2, key_heads: int = 2, tokens: int = 40, size: float = 0.8) -> list[Tensor]:
    """q, k, v with keys that differ in what they hold; logits of moderate size."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, tokens, 8, generator=generator) * size
    k = torch.randn(batch, key_heads, tokens, 8, generator=generator) * size + 0.5
    return [q, k, k + 0.3 * torch.randn(batch, key_heads, tokens, 8, generator=generator)]


def rel_error(mech: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> float:
    exact = softmax_attention(q, k, v, key_mask=mask, **options)
    out = mech(q, k, v, key_mask=mask, **options).double()
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
    return float(((out - exact) * real[:, None, :, None]).norm() / (exact * real[:, None, :, None]).norm())


def test_errors_are_those_of_sequences_that_were_held_out() -> None:
    q, k, v = tensors()
    mask = torch.ones(6, 40, dtype=torch.bool)
    mask[2, 30:] = False
    mech, choice = maclin.choose(q, k, v, key_mask=mask, candidates=[RAW, "efficient", "elu"], **LONG)
    learn, held = [0, 1, 3, 4], [2, 5]
    built = maclin.mechanism(RAW[0], head_dim=8, num_heads=2, **RAW[1])
    taught = maclin.calibrate(built, q[learn], k[learn], v[learn], mask[learn])
    wanted = {
        name: rel_error(tried, q[held], k[held], v[held], mask[held])
        for name, tried in (
            ("macformer", taught),
            ("efficient", maclin.mechanism("efficient", head_dim=8, num_heads=2)),
            ("elu", maclin.mechanism("elu", head_dim=8, num_heads=2)),
        )
    }
    assert {row.mechanism: row.rel_error for row in choice.rows} == pytest.approx(wanted, rel=1e-3)
    assert [row.rel_error for row in choice.rows] == sorted(row.rel_error or 0.0 for row in choice.rows)
    order = sorted(wanted, key=lambda name: wanted[name])
    assert (choice.mechanism, choice.runner_up) == (order[0], order[1]) == ("macformer", order[1])
    assert choice.margin == pytest.approx(wanted[order[1]] - wanted["macformer"], rel=1e-2)
    assert (choice.num_learning, choice.num_measured, choice.better_share) == (4, 2, 1.0)
    assert choice.rel_error == choice.rows[0].rel_error
    mean = maclin.mechanism("mean", head_dim=8, num_heads=2)
    assert choice.uniform_rel_error == pytest.approx(rel_error(mean, q[held], k[held], v[held], mask[held]), rel=1e-4)
    # what is handed over has learned from all sequences
    whole = maclin.calibrate(maclin.mechanism("macformer", head_dim=8, num_heads=2, **choice.config), q, k, v, mask)
    torch.testing.assert_close(mech(q, k, v, key_mask=mask), whole(q, k, v, key_mask=mask))
    assert choice.config["centred"] is True


def test_the_cheapest_within_the_tolerance_wins() -> None:
    q, k, v = tensors()
    loose = maclin.choose(q, k, v, candidates=[RAW, "efficient", "elu"], tolerance=0.99, **LONG).choice
    costs = {row.mechanism: row.relative_cost for row in loose.rows}
    assert loose.mechanism in ("efficient", "elu")
    assert costs[loose.mechanism] == min(cost for cost in costs.values() if cost is not None)
    assert all(row.within_tolerance for row in loose.rows)
    raw = next(row.rel_error for row in loose.rows if row.mechanism == "macformer")
    assert raw is not None
    tight = maclin.choose(q, k, v, candidates=[RAW, "efficient", "elu"], tolerance=raw * 1.01, **LONG).choice
    assert tight.mechanism == "macformer"
    assert [row.within_tolerance for row in tight.rows] == [True, False, False]


def test_exact_attention_stays_where_nothing_cheaper_fits() -> None:
    q, k, v = tensors()
    requests: list[dict[str, Any]] = [{"tolerance": 1e-6, **LONG}, {"length": 10}]
    for options in requests:
        mech, choice = maclin.choose(q, k, v, candidates=[RAW, ("window", {"window": 2})], **options)
        assert (mech.name, choice.mechanism, choice.rel_error, choice.better_share) == ("softmax", "softmax", 0, None)
        assert "exact attention" in choice.reason
    assert "not cheaper" in choice.rows[0].note


def test_kernels_compete_and_the_table_shows_all() -> None:
    q, k, v = tensors()
    mech, choice = maclin.choose(q, k, v, **LONG)
    kernels = {row.asked.get("kernel") for row in choice.rows if row.mechanism == "macformer"}
    assert kernels == {None, "exp", "inv", "log", "sqrt"}
    assert {row.mechanism for row in choice.rows} == set(maclin.mechanisms.names()) - {"softmax", "mean", "by_head"}
    assert mech.name == choice.mechanism
    text = str(choice)
    assert text.startswith(choice.mechanism)
    assert "uniform" in text
    assert len(text.splitlines()) == len(choice.rows) + 3
    assert from_json(Choice, to_json(choice)) == choice
    with pytest.raises(FrozenInstanceError):
        choice.mechanism = "elu"  # pyright: ignore[reportAttributeAccessIssue]


def test_causal_grouped_heads_and_scale_are_honoured() -> None:
    q, k, v = tensors(heads=4, key_heads=2)
    mech, choice = maclin.choose(q, k, v, is_causal=True, scale=0.2, candidates=["linformer", RAW, "elu"], **LONG)
    refused = next(row for row in choice.rows if row.mechanism == "linformer")
    assert "no causal form" in refused.note
    held = [2, 5]
    elu = maclin.mechanism("elu", head_dim=8, num_heads=4, num_kv_heads=2)
    wanted = rel_error(elu, q[held], k[held], v[held], is_causal=True, scale=0.2)
    assert next(r.rel_error for r in choice.rows if r.mechanism == "elu") == pytest.approx(wanted, rel=1e-4)
    assert mech(q, k, v, is_causal=True, scale=0.2).shape == q.shape


def test_two_sequences_are_enough_and_one_is_not() -> None:
    q, k, v = tensors(batch=2)
    choice = maclin.choose(q, k, v, candidates=[RAW], **LONG).choice
    assert (choice.num_learning, choice.num_measured) == (1, 1)
    assert (choice.runner_up, choice.margin) == (None, None)
    with pytest.raises(InputError, match="at least 2"):
        maclin.choose(q[:1], k[:1], v[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tolerance": 1.5}, OptionError, "between 0 and 1"),
        ({"length": 0}, OptionError, "at least 1 token"),
        ({"candidates": ["lineer"]}, OptionError, "known are"),
        ({"candidates": []}, InputError, "none was given"),
        ({"candidates": [("window", {"window": 0})]}, InputError, "window is 0"),
        ({"key_mask": torch.ones(2, 2)}, InputError, "key_mask"),
    ],
)
def test_bad_requests_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = tensors(batch=3, tokens=12)
    with pytest.raises(error, match=message):
        maclin.choose(q, k, v, **change)
    with pytest.raises(InputError, match="wanted \\(batch, heads"):
        maclin.choose(q[0], k, v)
