"""Stratified features: exact where all monomials are there, within their budget, and chosen per head."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import reference, stratified
from maclin.core.kernels import KERNELS
from maclin.core.mechanisms.macformer import Macformer
from maclin.core.stratified_map import StratifiedMap


def whole(width: int, highest: int) -> tuple[int, ...]:
    """All monomials up to a degree."""
    return tuple(math.comb(width + n - 1, n) for n in range(highest + 1))


def shifted(d: int, seed: int = 0, heads: int = 2, kv_heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(h: int) -> Tensor:
        return torch.randn(3, h, 30, d, generator=generator, dtype=torch.float64)

    return 0.8 * normal(heads) + 1.5, 0.7 * normal(kv_heads) - 0.9, normal(kv_heads)


def calibrated(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **options: Any) -> Macformer:
    sizes = {"head_dim": q.shape[3], "num_heads": q.shape[1], "num_kv_heads": k.shape[1]}
    mech = maclin.mechanism("macformer", **sizes, **({"ppsbn": False} | options)).double()
    mech = maclin.calibrate(mech, q, k, v, scale=scale)
    assert isinstance(mech, Macformer)
    return mech


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["exp", "trigh"])
@pytest.mark.parametrize("d", [1, 2])
def test_centring_is_exact(rel_error, d, kernel, causal):
    q, k, v = shifted(d)
    mech = calibrated(q, k, v, counts=whole(d, 30), kernel=kernel)
    of_q, of_k = (mech.map.get_buffer(name)[:, None] for name in ("q_centre", "k_centre"))
    for scale in (None, 0.3, 1.1):  # others than it was calibrated for, too
        with maclin.guarded() as counts:
            got = mech(q, k, v, scale=scale, is_causal=causal)
        factor = d**-0.5 if scale is None else scale
        h = (factor * (k - of_k) @ of_q.mT).exp().mT
        allowed = torch.ones(30, 30, dtype=torch.float64).tril() if causal else 1.0
        weights = (factor * (q - of_q) @ (k - of_k).mT).exp() * h * allowed
        enough = weights.sum(-1) >= 0.7 * (h * allowed).sum(-1)  # the floor takes the others for wrong
        assert counts.guarded == int((~enough).sum())
        assert float(enough.double().mean()) > (0.6 if causal else 0.8)
        wanted = reference.softmax_attention(q, k, v, scale=scale, is_causal=causal)
        assert rel_error(got[enough], wanted[enough]) < 2e-6
    # 30 degrees would not do without: the largest logit is beyond 15
    raw = maclin.mechanism("macformer", head_dim=d, num_heads=2, num_kv_heads=1, counts=whole(d, 10), ppsbn=False)
    few = calibrated(q, k, v, counts=whole(d, 10))
    wanted = reference.softmax_attention(q, k, v)
    assert rel_error(few(q, k, v), wanted) < 0.3 * rel_error(raw.double()(q, k, v), wanted)


def test_a_shift_is_a_factor_of_the_features():
    """<phi(x), phi(y)> is exp(scale <x, y - c_k>): what is left out depends on the query alone."""
    q, k, v = shifted(2)
    mech = calibrated(q, k, v, counts=whole(2, 30))
    centre = mech.map.get_buffer("k_centre")
    assert float(centre.norm()) > 0.3
    for scale in (0.2, 0.7):
        similarity = mech.query_map(q, scale) @ mech.feature_map(k, scale).mT
        wanted = (scale * q @ (k - centre[:, None]).mT).exp()
        torch.testing.assert_close(similarity, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kernel", ["exp", "inv", "log", "sqrt", "trigh"])
@pytest.mark.parametrize("with_data", [False, True])
def test_all_monomials_are_the_kernel(rel_error, kernel, with_data):
    q, k, v = shifted(3, seed=1)
    options: dict[str, Any] = {"kernel": kernel, "counts": whole(3, 12), "ppsbn": "token"}
    sizes = {"head_dim": 3, "num_heads": 2, "num_kv_heads": 1}
    mech = calibrated(q, k, v, 0.4, **options) if with_data else maclin.mechanism("macformer", **sizes, **options)
    mech = mech.double()
    assert isinstance(mech, Macformer)
    x, y = mech.normalised(q, k, 0.4)
    wanted = reference.kernel_attention(x, y, v, KERNELS[kernel], scale=0.4)
    assert rel_error(mech(q, k, v, scale=0.4), wanted) < 2e-5


@pytest.mark.parametrize("kernel", ["exp", "inv"])
@pytest.mark.parametrize("num_features", [10, 11, 20, 44, 45, 100, 300])
def test_no_budget_is_exceeded(problem, kernel, num_features):
    q, k, v = problem("aligned", 0.5, heads=2, kv_heads=2)
    for options in ({}, {"unbiased": True}):
        mech = calibrated(q, k, v, kernel=kernel, num_features=num_features, ppsbn="token", **options)
        assert mech.calibration is not None
        counts = mech.calibration.counts
        assert counts[:2] == (1, 8)
        assert all(count <= most for count, most in zip(counts, whole(8, len(counts)), strict=False))
        assert isinstance(mech.map, StratifiedMap)
        random = mech.map.tail or 0
        assert sum(counts) + random == mech.map.num_features == mech.feature_map(k).shape[-1] <= num_features
        assert mech.calibration.num_features == mech.map.num_features
        assert mech.num_features == mech.config["num_features"] == num_features
        assert (random > 0) == bool(options)


def test_a_large_enough_budget_is_used_where_it_helps(problem, rel_error):
    q, k, v = problem("aligned", 1.0)
    errors = []
    for num_features in (10, 15, 25, 60, 128):
        mech = calibrated(q, k, v, num_features=num_features)
        errors.append(rel_error(mech(q, k, v), reference.softmax_attention(q, k, v)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_each_head_gets_its_own_monomials(problem, rel_error):
    """Two key heads near different planes: what one keeps would not do for the other."""
    q, k, v = problem("aligned", 1.5, heads=2, kv_heads=2)
    mech = calibrated(q, k, v, num_features=30)
    wanted = reference.softmax_attention(q, k, v)
    assert rel_error(mech(q, k, v), wanted) < 0.05
    basis, directions = (mech.map.get_buffer(name) for name in ("q_basis", "directions"))
    assert rel_error(basis[0], basis[1]) > 0.5
    assert not torch.equal(directions[0], directions[1])
    swapped = calibrated(q.flip(1), k.flip(1), v.flip(1), num_features=30)
    assert rel_error(swapped(q, k, v), wanted) > 3 * rel_error(mech(q, k, v), wanted)


def test_a_head_that_no_degree_helps_averages(problem, rel_error):
    q, k, v = problem("isotropic", 1.0, heads=4, kv_heads=2)
    q = q * torch.tensor([1.0, 1.0, 60.0, 60.0])[:, None, None].double()
    mech = calibrated(q, k, v, counts=(1, 8))
    assert mech.calibration is not None
    assert mech.calibration.highest == (1, -1)
    assert mech.calibration.rel_error_by_head[0] < 0.2 < 0.9 < mech.calibration.rel_error_by_head[1]
    out = mech(q, k, v)
    torch.testing.assert_close(out[:, 2:], v[:, 1:].mean(2, keepdim=True).expand(-1, 2, 64, -1), rtol=1e-6, atol=1e-8)
    assert rel_error(out[:, :2], reference.softmax_attention(q, k, v)[:, :2]) < 0.2
    assert any("key heads [1]: every degree beyond averaging harms" in note for note in mech.calibration.note)


def test_counts_of_high_degrees_are_kept(problem, rel_error):
    q, k, v = problem("aligned", 1.0)
    for counts in ((1, 8, 0, 0, 150), (1, 8, 5, 4, 3, 2, 2, 2, 40), (1, 8, 0), (1, 8)):
        mech = calibrated(q, k, v, counts=counts)
        assert mech.calibration is not None
        assert mech.calibration.counts == counts
        phi = mech.query_map(q) @ mech.feature_map(k).mT
        assert (
            rel_error(mech(q, k, v), reference.feature_attention(mech.query_map(q), mech.feature_map(k), v, floor=0.7))
            < 1e-9
        )
        assert phi.shape == (6, 1, 64, 64)


def test_the_error_that_is_given_is_measured_on_what_was_held_back(problem, rel_error):
    q, k, v = problem("aligned", 1.5, heads=2, kv_heads=2)
    mech = calibrated(q, k, v, num_features=20)
    assert mech.calibration is not None
    held = [2, 5]
    got, wanted = (x[held] for x in (mech(q, k, v), reference.softmax_attention(q, k, v)))
    assert mech.calibration.rel_error == pytest.approx(rel_error(got, wanted), rel=1e-5)
    for head in (0, 1):
        assert mech.calibration.rel_error_by_head[head] == pytest.approx(
            rel_error(got[:, head], wanted[:, head]), rel=1e-5
        )
    learned = [0, 1, 3, 4]
    assert mech.calibration.rel_error != pytest.approx(
        rel_error(mech(q, k, v)[learned], reference.softmax_attention(q, k, v)[learned]), rel=1e-3
    )


@pytest.mark.parametrize(("head_dim", "num_features", "counts"), [
    (8, 128, (1, 8, 36)),
    (8, 20, (1, 8, 11)),
    (64, 128, (1, 64)),
    (64, 66, (1, 64)),
    (64, 512, (1, 64, 447)),
    (1, 3, (1, 1, 1)),
])  # fmt: skip
def test_the_counts_that_are_assumed_without_data(head_dim, num_features, counts):
    assert stratified.assumed(KERNELS["exp"], head_dim, num_features) == counts
    odd = maclin.Kernel("odd", lambda n: float(n == 1))
    assert stratified.assumed(odd, head_dim, num_features) == (1, head_dim)


def test_without_data_monomials_use_the_fewest_axes():
    strata = stratified.without_data(4, 2, (1, 4, 6, 3))
    assert strata.axes[0][2].tolist() == [[0, 0], [0, 1], [1, 1], [0, 2], [1, 2], [2, 2]]
    assert strata.axes[0][3].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1]]
    assert strata.rel_error is None
    assert [len(axes) for axes in strata.axes[1]] == [1, 4, 6, 3]
    with pytest.raises(maclin.OptionError, match="fewer monomials of degree 2"):
        stratified.without_data(4, 2, (1, 4, 11))
