"""The hybrid against all pairs, each with its one weight; what is learned, saved and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core.compose.hybrid import Hybrid
from maclin.core.errors import InputError, OptionError

D, H, HK, W = 16, 4, 2, 9

LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("favor", {"num_features": 24}),
    ("hedgehog", {"num_features": 24}),
    ("macformer", {"ppsbn": False, "num_features": 40}),
    ("macformer", {"ppsbn": False, "centred": True}),
    ("macformer", {"temperature": "learned"}),
    ("macformer", {"estimator": "published", "num_features": 24}),
    ("rfa", {"num_features": 24}),
    ("taylor", {}),
]


def made(linear: str, options: dict[str, Any], sinks: int = 0) -> Hybrid:
    mech = maclin.mechanism(
        "hybrid",
        head_dim=D,
        num_heads=H,
        num_kv_heads=HK,
        window=W,
        sinks=sinks,
        linear=linear,
        linear_options=options,
        balance="learned",
        generator=torch.Generator().manual_seed(0),
    )
    assert isinstance(mech, Hybrid)
    mech = mech.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mech.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        for name, buffer in mech.linear.named_buffers():
            if name.endswith("_centre"):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
    return mech


def inputs(n: int, s: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + s)
    q, k, v = (
        0.7 * torch.randn(2, heads, length, D, generator=generator, dtype=torch.float64)
        for heads, length in ((H, n), (HK, s), (HK, s))
    )
    mask = torch.rand(2, s, generator=generator) > 0.2
    mask[1, : min(s, 12)] = False
    return q, k, v, mask


def all_pairs(mech: Hybrid, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """N x S weights: exact ones near, those of the features elsewhere."""
    linear, groups = mech.linear, H // HK
    scale = linear._scale(None)
    exponent = linear.exponent(scale)
    assert exponent is not None
    assert mech.log_balance is not None
    factor = mech.log_balance.exp()[:, None, None]
    if exponent.left_out is not None:
        factor = factor * exponent.left_out(q).exp()[..., None]
    phi_q, phi_k = linear.query_map(q), linear.feature_map(k).repeat_interleave(groups, 1)
    exact = (exponent.query(q) @ exponent.key(k).repeat_interleave(groups, 1).mT).exp()
    n, s = q.shape[2], k.shape[2]
    apart = torch.arange(s)[None] - torch.arange(n)[:, None] - (s - n)
    near = (apart.abs() <= W) | (mask & (mask.cumsum(-1) <= mech.sinks))[:, None, None]
    allowed = mask[:, None, None] & ((apart <= 0) | (not causal))
    weights, least = (
        torch.where(near, exact, factor * (x @ y.mT)) * allowed
        for x, y in ((phi_q, phi_k), (phi_q[..., -1:], phi_k[..., -1:]))
    )
    floor = linear.features(scale).floor
    if floor:  # a row with too small a denominator is drawn towards the constant feature
        short, whole = least.sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
        share = torch.where(whole < floor * short, (1 - floor) * short / (short - whole), 1.0)
        weights = torch.lerp(least, weights, share)
    total = weights.sum(-1, keepdim=True)
    out = weights @ v.repeat_interleave(groups, 1) / torch.where(total == 0, torch.ones_like(total), total)
    post = linear.features(scale).post
    return out if post is None else post(out)


@pytest.mark.parametrize(("linear", "options"), LINEAR)
@pytest.mark.parametrize(("n", "s"), [(150, 150), (40, 170), (170, 40), (5, 5)])
@pytest.mark.parametrize("sinks", [0, 7])
def test_every_key_counts_once(linear: str, options: dict[str, Any], n: int, s: int, sinks: int) -> None:
    mech = made(linear, options, sinks)
    q, k, v, mask = inputs(n, s)
    with torch.no_grad():
        for causal in (False, True) if n <= s else (False,):
            wanted = all_pairs(mech, q, k, v, mask, causal)
            torch.testing.assert_close(mech(q, k, v, key_mask=mask, is_causal=causal), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_everything_is_softmax(causal: bool) -> None:
    q, k, v, mask = inputs(60, 60)
    drawn = torch.Generator().manual_seed(0)
    mech = maclin.mechanism("hybrid", head_dim=D, num_heads=H, num_kv_heads=HK, window=60, generator=drawn).double()
    exact = maclin.mechanism("softmax", head_dim=D, num_heads=H, num_kv_heads=HK).double()
    wanted = exact(3 * q, k, v, key_mask=mask, is_causal=causal)
    torch.testing.assert_close(mech(3 * q, k, v, key_mask=mask, is_causal=causal), wanted, rtol=1e-8, atol=1e-10)


def test_far_keys_of_any_size_leave_the_near_ones_alone() -> None:
    """What is taken off the sums again must not cost the digits of what stays."""
    q, k, v, _ = (x.float() for x in inputs(300, 300))
    drawn = torch.Generator().manual_seed(0)
    mech = maclin.mechanism(
        "hybrid", head_dim=D, num_heads=H, num_kv_heads=HK, window=W, linear="favor", generator=drawn
    )
    k[:, :, 150:] *= 12  # positive features of such keys overflow, were they no logarithms
    out = mech(q, k, v, is_causal=True)
    alone = mech(q[:, :, :150], k[:, :, :150], v[:, :, :150], is_causal=True)
    torch.testing.assert_close(out[:, :, :150], alone)
    assert bool(mech(q, k, v).isfinite().all())


def test_calibration_lowers_the_error_of_structured_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, D, generator=generator)
    q, k = (torch.randn(6, H, 200, 3, generator=generator) @ basis * 0.6 for _ in range(2))
    q, k = q + 0.5, k - 0.5
    v = torch.randn(6, H, 200, D, generator=generator) + k
    exact = maclin.mechanism("softmax", head_dim=D, num_heads=H)(q, k, v)
    errors: list[float] = []
    for linear, options in (("macformer", None), ("hedgehog", {"num_features": 32})):
        mech = maclin.mechanism(
            "hybrid", head_dim=D, num_heads=H, window=8, linear=linear, linear_options=options, generator=generator
        )
        learned = maclin.calibrate(mech, q[:5], k[:5], v[:5])
        with torch.no_grad():
            before, after = (float((m(q, k, v) - exact)[5:].norm() / exact[5:].norm()) for m in (mech, learned))
        errors += [before, after]
        rebuilt = maclin.mechanism("hybrid", head_dim=D, num_heads=H, **learned.config)
        rebuilt.load_state_dict(learned.state_dict())
        assert torch.equal(rebuilt(q, k, v), learned(q, k, v))
    assert errors[1] < 0.6 * errors[0]
    assert errors[3] < 0.6 * errors[2]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"linear": "elu"}, "elu"),
        ({"linear": "softmax"}, "softmax"),
        ({"linear": "efficient"}, "efficient"),
        ({"linear": "rfa", "linear_options": {"gate": True}}, "rfa"),
        ({"linear": "hedgehog", "linear_options": {"activation": "softmax"}}, "hedgehog"),
        ({"linear_options": {"ppsbn": "batch"}}, "macformer"),
        ({"linear_options": {"kernel": "inv", "ppsbn": "token"}}, "macformer"),
        ({"linear": "nothing"}, "nothing"),
        ({"window": 0}, "window is 0"),
        ({"balance": "some"}, "balance is 'some'"),
    ],
)
def test_what_has_no_common_scale_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        maclin.mechanism("hybrid", head_dim=D, num_heads=H, **options)


def test_a_state_of_another_configuration_is_refused() -> None:
    q, k, v, _ = inputs(12, 12)
    sizes = {"head_dim": D, "num_heads": H, "num_kv_heads": HK}
    _, state = maclin.mechanism("hybrid", **sizes, window=4).double()(q, k, v, is_causal=True, return_state=True)
    with pytest.raises(InputError, match="state has shapes"):
        maclin.mechanism("hybrid", **sizes, window=5).double()(q, k, v, is_causal=True, state=state)
