"""Sampled rows and exact attention of them, beside the float64 oracle and brute force."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maclin.adopt.guard.bounds import outliers
from maclin.adopt.guard.exact import exact_rows
from maclin.adopt.guard.rows import query_mask, sample_rows
from maclin.core import reference

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(
    batch: int = 2, heads: int = 4, key_heads: int = 2, n: int = 20, s: int = 20, width: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    shapes = (batch, heads, n, width), (batch, key_heads, s, width), (batch, key_heads, s, width + 2)
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return q, k, v


def test_each_stratum_gives_one_row_of_each_head() -> None:
    rows = sample_rows(3, 5, 4096, 32, None, generator(), CPU)
    assert rows.positions.shape == (3, 5, 32)
    assert torch.equal(rows.positions // 128, torch.arange(32).expand(3, 5, 32))
    assert bool(rows.taken.all())
    assert rows.tokens.tolist() == [4096] * 3


def test_heads_and_sequences_draw_on_their_own_and_a_seed_repeats() -> None:
    rows = sample_rows(3, 5, 4096, 32, None, generator(1), CPU).positions
    assert len({tuple(row.tolist()) for row in rows.flatten(0, 1)}) == 15
    assert torch.equal(rows, sample_rows(3, 5, 4096, 32, None, generator(1), CPU).positions)
    assert not torch.equal(rows, sample_rows(3, 5, 4096, 32, None, generator(2), CPU).positions)


def test_every_row_is_as_likely_as_any_other() -> None:
    rows = sample_rows(1, 20_000, 30, 4, None, generator(), CPU).positions
    share = torch.bincount(rows.flatten(), minlength=30) / 20_000
    assert (share - 4 / 30).abs().max() < 5 * math.sqrt(4 / 30 / 20_000)


def test_short_sequences_give_all_their_rows() -> None:
    rows = sample_rows(2, 3, 7, 32, None, generator(), CPU)
    assert torch.equal(rows.positions, torch.arange(7).expand(2, 3, 7))


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(2, 12))
@settings(deadline=None, max_examples=60)
def test_padding_is_never_sampled(mask: list[list[bool]], wanted: int) -> None:
    valid = torch.tensor(mask)
    rows = sample_rows(len(mask), 2, 9, wanted, valid, generator(), CPU)
    for i, one in enumerate(mask):
        tokens = [position for position, real in enumerate(one) if real]
        assert int(rows.tokens[i]) == len(tokens)
        assert int(rows.taken[i].sum()) == min(wanted, len(tokens))
        for head in range(2):
            found = rows.positions[i, head][rows.taken[i]].tolist()
            assert found == sorted(found)  # of few tokens neighbouring strata may give the same
            assert set(found) <= set(tokens)
            if len(tokens) <= wanted:
                assert found == tokens


def test_queries_are_the_last_keys_or_nobody_knows() -> None:
    mask = torch.tensor([[False, True, True, False]])
    assert query_mask(4, 4, None, False) is None
    whole = query_mask(4, 4, mask, False)
    assert whole is not None
    assert torch.equal(whole, mask)
    last = query_mask(2, 4, mask, True)
    assert last is not None
    assert last.tolist() == [[True, False]]
    assert query_mask(2, 4, mask, False) is None


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "heads", "key_heads", "scale"), [(20, 4, 2, None), (7, 6, 2, 0.9), (20, 3, 3, 0.1)])
def test_rows_are_those_of_exact_attention(
    is_causal: bool, masked: bool, n: int, heads: int, key_heads: int, scale: float | None
) -> None:
    q, k, v = made(heads=heads, key_heads=key_heads, n=n)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:], mask[1, :4] = False, False
    key_mask = mask if masked else None
    if masked:  # what is padded may be anything
        k[0, :, 15:], v[0, :, 15:] = math.nan, math.nan
    clean = (x.nan_to_num() for x in (q, k, v))
    wanted = reference.softmax_attention(*clean, key_mask=key_mask, is_causal=is_causal, scale=scale)
    positions = torch.stack([torch.randperm(n, generator=generator(i))[:5] for i in range(2 * heads)]).view(2, heads, 5)
    found = exact_rows(q, k, v, positions, key_mask, is_causal, scale)
    chosen = wanted.gather(2, positions[..., None].expand(-1, -1, -1, v.shape[-1]))
    torch.testing.assert_close(found.out.double(), chosen, atol=2e-6, rtol=1e-5)


def test_entropy_is_relative_to_the_keys_that_a_row_may_attend_to() -> None:
    q, k, v = made(batch=1, heads=2, key_heads=1, n=12, s=12)
    positions = torch.arange(12).expand(1, 2, 12)
    ratio = exact_rows(q, k, v, positions, None, True, None).entropy_ratio
    for head in range(2):
        for i in range(12):
            p = torch.softmax(k[0, 0, : i + 1] @ q[0, head, i] / math.sqrt(8), 0)
            wanted = 1.0 if i == 0 else float(-(p * p.log()).sum()) / math.log(i + 1)
            assert float(ratio[0, head, i]) == pytest.approx(wanted, abs=1e-5)
    sharp = exact_rows(1e4 * q, k, v, positions[..., 5:], None, True, None).entropy_ratio
    assert float(sharp.max()) < 1e-3
    flat = exact_rows(0 * q, k, v, positions, None, False, None).entropy_ratio
    torch.testing.assert_close(flat, torch.ones_like(flat))


def test_half_precision_is_summed_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in made(n=300, s=300))
    positions = torch.arange(0, 300, 10).expand(2, 4, 30)
    found = exact_rows(q, k, v, positions, None, False, None)
    wanted = reference.softmax_attention(q.double(), k.double(), v.double())
    assert found.out.dtype == torch.float32
    torch.testing.assert_close(found.out.double(), wanted[:, :, ::10], atol=1e-5, rtol=1e-4)


def test_the_largest_block_of_weights_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from maclin.adopt.guard import exact

    q, k, v = made(n=50, s=50)
    positions = torch.arange(50).expand(2, 4, 50)
    whole = exact_rows(q, k, v, positions, None, False, None)
    monkeypatch.setattr(exact, "_BLOCK_NUMBERS", 2 * 4 * 50 * 7)
    torch.testing.assert_close(exact_rows(q, k, v, positions, None, False, None), whole)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_the_bound_of_all_rows_is_below_the_true_error(is_causal: bool, size: float) -> None:
    q, k, v = made(n=16)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 17:] = False
    exact = reference.softmax_attention(q, k, v, key_mask=mask, is_causal=is_causal)
    out = exact + size * torch.randn(exact.shape, generator=generator())
    valid = query_mask(16, 20, mask, is_causal)
    keep = torch.ones(2, 16, dtype=torch.bool) if valid is None else valid
    found = outliers(out.float(), v, mask, is_causal, valid)
    for i, one in enumerate(found):
        error = (out - exact)[i][:, keep[i]].norm()
        whole = float(exact[i][:, keep[i]].norm())
        assert one.least_rel_error() <= one.least_rel_error(whole**2) <= float(error) / whole * 1.001
        assert one.excess <= float(error.square()) * 1.001
        assert one.nonfinite == 0
    assert (found[0].beyond > 0) == (size >= 1)
    assert all(one.beyond == 0 for one in outliers(exact.float(), v, mask, is_causal, valid))


def test_rows_that_are_not_finite_are_counted_but_not_those_of_padding() -> None:
    v = made(n=20)[2]
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 10:] = False
    out = torch.zeros(2, 4, 20, 10)
    out[0, 1, 3, 0], out[0, 2, 3, 5], out[1, 0, 15, 0] = math.nan, math.inf, math.nan
    counted: list[Any] = [one.nonfinite for one in outliers(out, v, mask, False, query_mask(20, 20, mask, False))]
    assert counted == [2, 0]
