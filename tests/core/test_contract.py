"""The contraction: sums that merge, readings that combine, extreme logits, the denominator policy, memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import maclin
from maclin.bench import largest_intermediate
from maclin.core import algebra, blocks, contract, statistics
from maclin.core import causal as causal_contract
from maclin.core.causal import attend_causal
from maclin.core.contract import (
    Features,
    Reading,
    Sums,
    accumulate,
    attend,
    combine,
    empty_sums,
    finish,
    merge,
    read,
)
from maclin.core.fast import causal as fast_causal
from maclin.core.fast import memory
from maclin.core.mechanisms.efficient import Efficient
from maclin.core.mechanisms.favor import Favor
from maclin.core.mechanisms.taylor import Taylor

MAPS: dict[str, Callable[[], Features]] = {
    "linear": lambda: Taylor(8, 4, 2).features(0.3),
    "log": lambda: Favor(8, 4, 2, num_features=12, generator=torch.Generator().manual_seed(0)).features(0.3),
    "channel": lambda: Efficient(8, 4, 2).features(1.0),
    "count": lambda: Efficient(8, 4, 2, normalisation="scaling").features(1.0),
}


@pytest.fixture(params=[(name, form) for name in MAPS for form in ("blocked", "plain")], ids="-".join)
def maps(request) -> Features:
    name, form = request.param
    features = MAPS[name]()
    return features if form == "blocked" else replace(features, maps=None)


def small_blocks(monkeypatch, block: int = 7, chunk: int = 5) -> None:
    monkeypatch.setattr(memory, "_SHARE", 0.0)
    monkeypatch.setattr(memory, "_STEP", block)
    monkeypatch.setattr(fast_causal, "CHUNK", chunk)
    monkeypatch.setattr(contract, "_MOST_BYTES", 1)
    monkeypatch.setattr(blocks, "_MIN_BLOCK", block)
    monkeypatch.setattr(causal_contract, "_CHUNK", chunk)


def unscaled(sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """kv, z and count without the scale of the log domain."""
    if sums.log_scale.shape[-1] == 0:
        return sums.kv, sums.z, sums.count
    scale = sums.log_scale.exp()
    return sums.kv * scale[..., None], sums.z * scale, sums.count


@pytest.mark.parametrize("cut", [0, 1, 17, 40])
@pytest.mark.parametrize("kind", ["none", "left", "all"])
def test_sums_of_parts_merge_to_the_sums_of_the_whole(qkv, key_mask, maps, cut, kind):
    q, k, v = qkv(6, 40)
    mask = key_mask(kind, 40)
    first, second = (
        accumulate(k[:, :, part], v[:, :, part], maps, None if mask is None else mask[:, part])
        for part in (slice(0, cut), slice(cut, None))
    )
    whole = accumulate(k, v, maps, mask)
    for merged in (merge(first, second), merge(second, first), merge(merge(empty_sums(k, v, maps), first), second)):
        torch.testing.assert_close(unscaled(merged), unscaled(whole), rtol=1e-11, atol=1e-12)
        out = finish(read(q, merged, maps))
        torch.testing.assert_close(out, attend(q, k, v, maps, mask), rtol=1e-9, atol=1e-11)


def test_sums_continue_where_others_ended(qkv, maps):
    _, k, v = qkv(6, 40)
    known = accumulate(k[:, :, :13], v[:, :, :13], maps, None)
    kept = [x.clone() for x in known]
    continued = accumulate(k[:, :, 13:], v[:, :, 13:], maps, None, known)
    torch.testing.assert_close(unscaled(continued), unscaled(accumulate(k, v, maps, None)), rtol=1e-11, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(known, kept, strict=True))


def test_the_sums_are_what_they_say(qkv, key_mask, maps):
    _, k, v = qkv(6, 40)
    mask = key_mask("random", 40)
    phi = maps.key(k).exp() if maps.log_domain else maps.key(k)
    phi = phi * mask[:, None, :, None]
    kv, z, count = unscaled(accumulate(k, v, maps, mask))
    torch.testing.assert_close(kv, torch.einsum("bhsm,bhse->bhme", phi, v), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(z, phi.sum(2), rtol=1e-11, atol=1e-12)
    assert torch.equal(count, mask.sum(-1).double())


def test_empty_sums_read_as_nothing(qkv, maps):
    q, k, v = qkv(6, 4)
    nothing = empty_sums(k, v, maps)
    for sums in (nothing, merge(nothing, nothing), accumulate(k, v, maps, torch.zeros(2, 4, dtype=torch.bool))):
        assert torch.equal(finish(read(q, sums, maps)), torch.zeros(2, 4, 6, 5, dtype=torch.float64))


def test_log_scales_far_apart_merge_without_overflow(qkv):
    maps = MAPS["log"]()
    q, k, v = qkv(6, 10)
    far = k.clone()
    far[:, :, 5:] *= 60.0  # exponents of minus thousands beside exponents around 0
    merged = merge(*(accumulate(far[:, :, part], v[:, :, part], maps, None) for part in (slice(5, 10), slice(0, 5))))
    assert all(bool(x.isfinite().all()) for x in merged)
    torch.testing.assert_close(finish(read(q, merged, maps)), attend(q, far, v, maps, None), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "log"])
@pytest.mark.parametrize("cuts", [(0, 20, 40), (0, 13, 14, 40), (0, 0, 40)])
def test_readings_of_parts_combine_to_the_reading_of_the_whole(qkv, name, cuts):
    maps = MAPS[name]()
    q, k, v = qkv(6, 40)
    parts = [read(q, accumulate(k[:, :, a:b], v[:, :, a:b], maps, None), maps) for a, b in pairwise(cuts)]
    torch.testing.assert_close(finish(combine(*parts)), attend(q, k, v, maps, None), rtol=1e-9, atol=1e-11)


def test_a_reading_in_logarithms_combines_with_one_that_is_not():
    def reading(numerator: float, denominator: float, log_scale: float | None) -> Reading:
        row = torch.tensor([[[denominator]]], dtype=torch.float64)
        scale = None if log_scale is None else torch.full_like(row, log_scale)
        return Reading(torch.tensor([[[[numerator]]]], dtype=torch.float64), row, row, scale)

    wanted = (3.0 + math.e * 8.0) / (2.0 + math.e * 4.0)
    for parts in ((3.0, 2.0, None), (8.0, 4.0, 1.0)), ((8.0, 4.0, 1.0), (3.0, 2.0, None)):
        assert float(finish(combine(*(reading(*part) for part in parts)))) == pytest.approx(wanted, rel=1e-13)
    # a part without keys has any scale, and must not set that of the others
    for parts in ((0.0, 0.0, 900.0), (8.0, 4.0, -900.0)), ((8.0, 4.0, -900.0), (0.0, 0.0, 900.0)):
        assert float(finish(combine(*(reading(*part) for part in parts)))) == pytest.approx(2.0, rel=1e-13)


def log_sum_exp_attention(log_q: Tensor, log_k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax over keys of the log-sum-exp over features, with every pair made explicitly."""
    logits = torch.logsumexp(log_q[:, :, :, None] + log_k[:, :, None], dim=-1)
    weights = torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1).nan_to_num(0.0)
    return weights @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "left", "right", "all"])
@pytest.mark.parametrize(
    ("norm", "dtype", "tolerance"), [(100, "float32", 1e-3), (100, "float64", 1e-10), (2, "float32", 1e-5)]
)
def test_extreme_logits_are_right_in_the_log_domain(qkv, key_mask, rel_error, causal, kind, norm, dtype, tolerance):
    n = 140  # a whole chunk, and a part of one
    q, k, v = qkv(n, n, heads=2, kv_heads=2)
    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    mask = key_mask(kind, n)
    favor = Favor(8, 2, num_features=16, generator=torch.Generator().manual_seed(1)).double()
    scale = 8**-0.5
    directions = favor.directions[None]
    log_q, log_k = (x * scale**0.5 @ directions - scale * (x * x).sum(-1, keepdim=True) / 2 for x in (q, k))
    allowed = torch.ones(n, n, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    allowed = allowed if mask is None else allowed & mask[:, None, None]
    wanted = log_sum_exp_attention(log_q, log_k, v, allowed)
    narrow = [x.to(getattr(torch, dtype)) for x in (q, k, v)]
    if dtype == "float32":
        favor = favor.float()
    assert rel_error(favor(*narrow, key_mask=mask, is_causal=causal), wanted) < tolerance


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_keys_are_right_normalised_per_channel(qkv, rel_error, causal, dtype):
    q, k, v = qkv(70, 70, heads=2, kv_heads=2)
    k = 300 * k / k.norm(dim=-1, keepdim=True)
    allowed = torch.ones(70, 70, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    logits = k.transpose(2, 3)[:, :, :, None].expand(-1, -1, -1, 70, -1)  # (B, H, D, N, S)
    rho_k = torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)
    wanted = torch.einsum("bhnd,bhdns,bhse->bhne", torch.softmax(q, dim=-1), rho_k, v)
    efficient = maclin.mechanism("efficient", head_dim=8, num_heads=2)
    assert rel_error(efficient(*(x.to(dtype) for x in (q, k, v)), is_causal=causal), wanted) < 1e-4


def test_a_later_giant_key_leaves_earlier_rows_alone(qkv, rel_error):
    q, k, v = qkv(100, 100, heads=2, kv_heads=2, dtype=torch.float32)
    for name, options in (("favor", {"num_features": 16}), ("efficient", {})):
        mech = maclin.mechanism(name, head_dim=8, num_heads=2, **options)
        before = mech(q, k, v, is_causal=True)
        other = k.clone()
        other[:, :, 60:] *= 500.0
        assert rel_error(mech(q, other, v, is_causal=True)[:, :, :60], before[:, :, :60]) < 1e-6


# A map that hands x over, so that every denominator is what the test makes it: q z.
PLAIN = Features(lambda q: q, lambda k: k, 2)


def plain(rows: list[list[float]], keys: list[list[float]], v: list[float]) -> tuple[Tensor, statistics.GuardCounts]:
    q, k = (torch.tensor(x, dtype=torch.float64)[None, None] for x in (rows, keys))
    with maclin.guarded() as counts:
        out = attend(q, k, torch.tensor(v, dtype=torch.float64)[None, None, :, None], PLAIN, None)
    return out[0, 0, :, 0], counts


def test_denominators_without_a_right_digit_are_guarded_with_their_sign():
    # z = (1, -1 + 2^-52), |z| = sqrt(2), kv = (3, 5)
    eps = torch.finfo(torch.float64).eps
    keys, v = [[1.0, 0.0], [0.0, -1.0 + eps]], [3.0, -5.0 / (1.0 - eps)]
    length = math.sqrt(2.0)
    floor = 8 * eps * length * length
    rows = [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 0.5]]
    out, counts = plain(rows, keys, v)
    #         tiny, kept positive; tiny, kept negative; fine; negative and kept; fine
    wanted = [8.0 / floor, -8.0 / -floor, -2.0 / 2.0, 2.0 / -2.0, 5.5 / 0.5]
    assert out.tolist() == pytest.approx(wanted, rel=1e-9)
    assert (counts.rows, counts.negative, counts.guarded) == (5, 2, 2)


def test_an_exactly_zero_denominator_is_guarded_as_positive():
    out, counts = plain([[1.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]], [3.0, -5.0])
    floor = 8 * torch.finfo(torch.float64).eps * 2.0
    assert out.tolist() == pytest.approx([8.0 / floor, 3.0], rel=1e-9)
    assert (counts.rows, counts.negative, counts.guarded) == (2, 0, 1)


def test_what_underflows_stays_finite():
    # q z = 1e-40 - 1e-40 under a bound of 2e-40, of which 8 units of rounding are no float32
    q, k = torch.full((1, 1, 1, 2), 1e-20), torch.tensor([[[[1e-20, 0.0], [0.0, -1e-20]]]])
    assert bool(attend(q, k, torch.ones(1, 1, 2, 1), PLAIN, None).isfinite().all())
    # |z| underflows to 0, but q z does not
    out = attend(torch.ones(1, 1, 1, 2), torch.full((1, 1, 3, 2), 1e-30), torch.full((1, 1, 3, 1), 7.0), PLAIN, None)
    torch.testing.assert_close(out, torch.full_like(out, 7.0))


def test_rows_without_keys_are_zero_and_not_counted(qkv):
    q, k, v = qkv(3, 4)
    taylor = maclin.mechanism("taylor", head_dim=8, num_heads=4, num_kv_heads=2)
    mask = torch.tensor([[True] * 4, [False] * 4])
    for causal in (False, True):
        with maclin.guarded() as counts:
            out = taylor(q, k, v, key_mask=mask, is_causal=causal)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert bool((out[0] != 0).all())
        assert counts.rows == 4 * 3


@pytest.mark.parametrize("causal", [False, True])
def test_negative_denominators_are_counted_and_kept(causal):
    """Taylor-1 weights 1 + t are negative below t = -1, and the quotient stays what the formula says."""
    q = torch.tensor([[[[-4.0], [1.0]]]], dtype=torch.float64)
    k, v = torch.tensor([[[[1.0], [0.5]]]], dtype=torch.float64), torch.tensor([[[[2.0], [7.0]]]], dtype=torch.float64)
    with maclin.guarded() as counts:
        out = maclin.mechanism("taylor", head_dim=1, num_heads=1)(q, k, v, is_causal=causal)
    first = 2.0 if causal else ((1 - 4) * 2.0 + (1 - 2) * 7.0) / ((1 - 4) + (1 - 2))
    assert out.flatten().tolist() == pytest.approx([first, (2 * 2.0 + 1.5 * 7.0) / 3.5], rel=1e-12)
    assert (counts.rows, counts.negative, counts.guarded) == (2, 1, 0)


def test_guarded_blocks_nest_and_end(qkv):
    q, k, v = qkv(3, 3)
    mean = maclin.mechanism("mean", head_dim=8, num_heads=4, num_kv_heads=2)
    with maclin.guarded() as outer:
        with maclin.guarded() as inner:
            pass  # both have counted the same so far
        mean(q, k, v)
        assert (outer.rows, inner.rows) == (24, 0)
        with maclin.guarded() as inner:
            mean(q, k, v)
        assert (outer.rows, inner.rows) == (48, 24)
    mean(q, k, v)
    assert (outer.rows, inner.rows) == (48, 24)
    assert not statistics.asked()


def count_and_fail() -> None:
    with maclin.guarded():
        raise KeyError("inside")


def test_an_error_ends_the_counting():
    with pytest.raises(KeyError, match="inside"):
        count_and_fail()
    assert not statistics.asked()


LONG = {
    "mean": {},
    "elu": {},
    "taylor": {},
    "efficient": {},
    "favor": {"num_features": 4},
    "rfa": {"num_features": 4},
    "macformer": {"num_features": 4},
    "revisited_linformer": {},
    "softmax": {},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_long_sums_of_half_precision_neither_overflow_nor_stall(name, dtype):
    """70000 keys with value 1: beyond the largest float16, and far beyond where bfloat16 stops counting."""
    mech = maclin.mechanism(name, head_dim=2, num_heads=1, **LONG[name])
    q, k = torch.ones(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 70_000, 2, dtype=dtype)
    v = torch.ones(1, 1, 70_000, 1, dtype=dtype)
    for causal in (False, True) if mech.causal else (False,):
        out = mech(q, k, v, is_causal=causal)
        assert out.dtype == dtype
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-2)


def test_scaling_by_the_count_survives_half_precision():
    mech = maclin.mechanism("efficient", head_dim=2, num_heads=1, normalisation="scaling")
    one = torch.ones(1, 1, 70_000, 2, dtype=torch.float16)
    torch.testing.assert_close(mech(one[:, :, :3], one, one), 2 * one[:, :, :3])  # q k = 2


@pytest.mark.parametrize("name", ["macformer", "favor", "rfa"])
def test_features_are_never_stored_whole(name):
    n, m = 8192, 256
    mech = maclin.mechanism(name, head_dim=8, num_heads=2, num_features=m, generator=torch.Generator().manual_seed(0))
    q, k, v = (torch.randn(1, 2, 4 * n, 8) for _ in range(3))
    largest: list[int] = []
    for length in (4 * n, n):
        largest.append(largest_intermediate(partial(mech, *(x[:, :, :length] for x in (q, k, v)))))
    assert largest[0] < 4 * 2 * 4 * n * m / 8  # bytes
    out = 4 * 2 * 4 * n * 8
    assert largest[0] <= 1.25 * max(largest[1], out)  # a block, whatever the length; blocks are of equal length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "left", "all"])
def test_gradients_are_those_of_finite_differences(monkeypatch, qkv, key_mask, maps, causal, kind):
    small_blocks(monkeypatch, block=3, chunk=5)
    q, k, v = (x.requires_grad_() for x in qkv(6, 9, dv=2))
    mask = key_mask(kind, 9)

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causal(q, k, v, maps, mask)[0] if causal else attend(q, k, v, maps, mask)

    assert torch.autograd.gradcheck(out, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("kind", ["none", "left", "random"])
def test_gated_gradients_are_those_of_finite_differences(monkeypatch, qkv, key_mask, kind):
    small_blocks(monkeypatch, chunk=4)
    rfa = maclin.mechanism("rfa", head_dim=8, num_heads=2, num_kv_heads=1, num_features=6, gate=True).double()
    q, k, v = (x.requires_grad_() for x in qkv(6, 9, heads=2, kv_heads=1, dv=2))
    weight = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def out(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"gate_weight": weight, "gate_bias": bias}
        arguments = {"is_causal": True, "key_mask": key_mask(kind, 9)}
        return torch.func.functional_call(rfa, parameters, (q, k, v), arguments)

    assert torch.autograd.gradcheck(out, (q, k, v, weight, bias), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_the_same_with_and_without_gradients(monkeypatch, qkv, maps, causal):
    small_blocks(monkeypatch)
    q, k, v = qkv(11, 19)

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causal(q, k, v, maps, None)[0] if causal else attend(q, k, v, maps, None)

    with torch.no_grad():
        without = out(q, k, v)
    torch.testing.assert_close(out(*(x.requires_grad_() for x in (q, k, v))).detach(), without, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("heads", [2, 6])
def test_each_query_head_uses_the_weight_of_its_key_head(heads):
    x, weight = torch.randn(3, heads, 5, 4), torch.randn(2, 4, 7)
    wanted = torch.stack([x[:, h] @ weight[h * 2 // heads] for h in range(heads)], dim=1)
    torch.testing.assert_close(algebra.per_key_head(x, weight), wanted)
    per_sample = torch.randn(3, 2, 4, 7)
    wanted = torch.stack([x[:, h] @ per_sample[:, h * 2 // heads] for h in range(heads)], dim=1)
    torch.testing.assert_close(algebra.per_key_head(x.mT.contiguous().mT, per_sample), wanted)


def test_the_sums_stay_wide_under_autocast(qkv):
    q, k, v = qkv(300, 300, dtype=torch.float32)
    for name in ("elu", "efficient", "macformer", "taylor"):
        mech = maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2)
        rounded = [x.bfloat16() for x in (q, k, v)]
        wanted = mech(*rounded, is_causal=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # rotary embeddings leave q and k wide and v narrow
            out, state = mech(q, k, v.bfloat16(), is_causal=True, return_state=True)
        assert torch.equal(out, wanted)
        assert out.dtype == torch.bfloat16
        assert {x.dtype for x in state} == {torch.float32}
