"""The least denominator of truncated series, against the float64 reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import causal as causal_contract
from maclin.core import contract, reference
from maclin.core.causal import attend_causal
from maclin.core.contract import Features, Reading, accumulate, attend, combine, finish, read
from maclin.core.mechanisms import FeatureMechanism

FLOOR = 0.7
WIDTH = 8


def series(x: Tensor) -> Tensor:
    """Degrees 1 and 0, the constant last: with long vectors many denominators are small or negative."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


FEATURES = Features(series, series, WIDTH + 1, floor=FLOOR)


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch) -> None:
    if request.param == "blocks":
        monkeypatch.setattr(contract, "_MOST_BYTES", 1)
        monkeypatch.setattr("maclin.core.blocks._MIN_BLOCK", 5)
        monkeypatch.setattr(causal_contract, "_CHUNK", 7)


def row_by_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, int, int]:
    """out, how many rows have too little, and how many have a negative sum; one row after the other."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    short = negative = 0
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        keys = [
            j
            for j in range(k.shape[2])
            if (mask is None or mask[b, j]) and (not causal or j <= i + k.shape[2] - q.shape[2])
        ]
        if not keys:
            continue
        y, values = (x[b, h * k.shape[1] // q.shape[1], keys] for x in (k, v))
        beyond = y @ q[b, h, i]
        share = 1.0
        negative += int(float(len(keys) + beyond.sum()) < 0)
        if float(len(keys) + beyond.sum()) < FLOOR * len(keys):
            short += 1
            share = (FLOOR - 1) * len(keys) / float(beyond.sum())
        weights = 1 + share * beyond
        assert float(weights.sum()) > FLOOR * len(keys) * (1 - 1e-9)
        out[b, h, i] = weights @ values / weights.sum()
    return out, short, negative


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "right", "left", "random", "all"])
def test_rows_with_too_little_are_shrunk(qkv, key_mask, rel_error, causal, kind):
    q, k, v = qkv(20, 20)
    mask = key_mask(kind, 20)
    wanted, short, negative = row_by_row(q, k, v, mask, causal)
    assert short > 10
    assert negative > 0
    with maclin.guarded() as counts:
        got = attend_causal(q, k, v, FEATURES, mask)[0] if causal else attend(q, k, v, FEATURES, mask)
    assert rel_error(got, wanted) < 1e-10
    assert counts.guarded == short
    assert counts.negative == 0
    of_reference = reference.feature_attention(series(q), series(k), v, key_mask=mask, is_causal=causal, floor=FLOOR)
    assert rel_error(of_reference, wanted) < 1e-10


def test_without_a_floor_nothing_is_shrunk(qkv, rel_error):
    q, k, v = qkv(20, 20)
    without = Features(series, series, WIDTH + 1)
    assert rel_error(attend(q, k, v, without, None), reference.feature_attention(series(q), series(k), v)) < 1e-9
    with maclin.guarded() as counts:
        attend(q, k, v, without, None)
    assert counts.guarded == 0
    assert counts.negative > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "left", "all"])
def test_gradients_are_finite_and_those_of_finite_differences(monkeypatch, qkv, key_mask, causal, kind):
    monkeypatch.setattr(causal_contract, "_CHUNK", 4)
    q, k, v = (x.requires_grad_() for x in qkv(6, 9, dv=2))
    mask = key_mask(kind, 9)

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causal(q, k, v, FEATURES, mask)[0] if causal else attend(q, k, v, FEATURES, mask)

    with maclin.guarded() as counts:
        out(q, k, v)
    assert counts.guarded > 0
    assert torch.autograd.gradcheck(out, (q, k, v), fast_mode=True)


def readings(q: Tensor, k: Tensor, v: Tensor, cut: int) -> list[Reading]:
    return [
        read(q, accumulate(k[:, :, at], v[:, :, at], FEATURES, None), FEATURES) for at in (slice(cut), slice(cut, None))
    ]


def test_parts_are_shrunk_together(qkv, rel_error):
    q, k, v = qkv(20, 20)
    wanted, *_ = row_by_row(q, k, v, None, False)
    together = finish(combine(*readings(q, k, v, 9)), floor=FLOOR)
    assert rel_error(together, wanted) < 1e-10


@pytest.mark.parametrize("log_scale", [None, 0.0, 40.0, -3.0])
def test_a_part_without_a_series_is_left_whole(qkv, rel_error, log_scale):
    """Exact weights of the last keys beside a series of the first, as in a hybrid; the logarithm is a scale only."""
    q, k, v = qkv(20, 20)
    k_all, v_all = (x.repeat_interleave(2, 1) for x in (k, v))
    exact = (0.3 * q @ k_all[:, :, 12:].mT).exp()
    parts = [readings(q, k, v, 12)[0], Reading(exact @ v_all[:, :, 12:], exact.sum(-1), exact.sum(-1))]
    if log_scale is not None:
        numerator, denominator, magnitude = (x * math.exp(-log_scale) for x in parts[1][:3])
        parts[1] = Reading(numerator, denominator, magnitude, torch.full_like(denominator, log_scale))
    got = finish(combine(*parts), floor=FLOOR)
    beyond = q @ k_all[:, :, :12].mT
    kept = 12 + exact.sum(-1)
    total = kept + beyond.sum(-1)
    share = torch.where(total < FLOOR * kept, (FLOOR - 1) * kept / beyond.sum(-1), 1.0)
    assert int((share < 1).sum()) > 5
    weights = torch.cat([1 + share[..., None] * beyond, exact], dim=-1)
    assert rel_error(got, weights @ v_all / weights.sum(-1, keepdim=True)) < 1e-9


def test_only_a_truncated_series_of_centred_keys_has_a_floor(problem):
    q, k, v = problem("aligned", 1.0)

    def floor(calibrated: bool, **options: Any) -> float:
        mech = maclin.mechanism("macformer", head_dim=8, num_heads=1, **options)
        mech = maclin.calibrate(mech, q, k, v) if calibrated else mech
        assert isinstance(mech, FeatureMechanism)
        return mech.features(0.3).floor

    assert floor(True) == FLOOR
    assert floor(False, centred=True) == FLOOR
    assert floor(True, kernel="trigh") == FLOOR
    assert floor(False) == 0
    assert floor(True, kernel="inv") == 0
    assert floor(True, unbiased=True) == 0
    assert floor(True, estimator="published") == 0


def test_outside_what_it_was_calibrated_on_a_calibrated_mechanism_keeps_the_sign(problem, rel_error):
    q, k, v = problem("aligned", 1.0, shift=0.4)
    mech = maclin.mechanism("macformer", head_dim=8, num_heads=1, ppsbn=False, counts=(1, 8))
    mech = maclin.calibrate(mech.double(), q, k, v)
    assert isinstance(mech, FeatureMechanism)
    v = v.abs()  # so that weights of mostly one sign leave out positive in the mean
    far = 4 * q
    with maclin.guarded() as counts:
        out = mech(far, k, v)
    phi_q, phi_k = mech.query_map(far), mech.feature_map(k)
    sums = (phi_q @ phi_k.mT).sum(-1)
    short = sums < FLOOR * (phi_q[..., -1:] @ phi_k[..., -1:].mT).sum(-1)
    assert counts.guarded == int(short.sum()) > 20
    assert counts.negative == 0
    wanted = reference.feature_attention(phi_q, phi_k, v, floor=FLOOR)
    assert rel_error(out, wanted) < 1e-9
    assert float(out.abs().max()) < 4 * float(v.abs().max())


def test_keys_whose_weight_is_cut_are_counted(problem):
    q, k, v = problem("aligned", 2.0, shift=1.0)
    mech = maclin.mechanism("macformer", head_dim=8, num_heads=1, ppsbn=False)
    mech = maclin.calibrate(mech.double(), q, k, v)
    with maclin.guarded() as counts:
        mech(q, k, v)
    assert counts.clamped == 0
    centre = mech.get_buffer("map.q_centre")[0]
    with maclin.guarded() as counts:
        out = mech(q, k + 200 * centre * torch.tensor([1.0, -1.0, 0.0]).double().repeat(22)[:64, None], v)
    assert counts.clamped == 6 * 43
    assert bool(out.isfinite().all())
