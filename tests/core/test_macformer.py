"""Macformer: convergence to the kernel it estimates, ppSBN, temperature, and what is refused or carried over."""

import copy
import io
import json
import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import reference
from maclin.core.errors import CapabilityError, InputError, OptionError
from maclin.core.features import DEGREE_LAWS
from maclin.core.kernels import KERNELS
from maclin.core.mechanisms.macformer import Macformer
from maclin.core.norms import batch_moments, batch_standardise, token_standardise

ESTIMATORS: dict[str, dict[str, Any]] = {
    "published": {"estimator": "published"},
    "kar_karnick": {"estimator": "kar_karnick"},
    "taylor": {"estimator": "taylor"},
    "stratified": {},
    "counts": {"counts": (1, 8, 20, 9), "num_features": 50},
    "unbiased": {"unbiased": True, "num_features": 40},
    "centred": {"centred": True},
}
DRAWN = ("published", "kar_karnick", "unbiased")
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def build(seed: int = 0, head_dim: int = 8, num_heads: int = 4, num_kv_heads: int = 2, **options) -> Macformer:
    return Macformer(head_dim, num_heads, num_kv_heads, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("estimator", DRAWN)
def test_the_error_of_the_output_falls_like_one_over_the_root_of_m(qkv, estimator):
    q, k, v = qkv(24, 48, batch=1)
    q, k = (1.2 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    wanted = reference.kernel_attention(q, k, v, KERNELS["exp"], scale=1.0)
    sizes, errors = [64, 128, 256, 512, 1024], []
    for m in sizes:
        squares = [
            (
                build(1000 * m + seed, **(ESTIMATORS[estimator] | {"num_features": m}), ppsbn=False).double()(
                    q, k, v, scale=1.0
                )
                - wanted
            )
            .square()
            .mean()
            for seed in range(20 if estimator == "unbiased" else 30)
        ]
        errors.append(math.sqrt(float(torch.stack(squares).median())))
    exact = 1 + 8 + 36 if estimator == "unbiased" else 0  # the rest is random
    logs = torch.tensor([[math.log(m - exact) for m in sizes], [math.log(x) for x in errors]], dtype=torch.float64)
    centred = logs - logs.mean(1, keepdim=True)
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.25 * float(wanted.square().mean().sqrt())


@pytest.mark.parametrize("estimator", DRAWN)
@pytest.mark.parametrize("kernel", KERNELS)
def test_many_features_come_close_to_the_kernel_after_ppsbn(qkv, rel_error, kernel, estimator):
    q, k, v = qkv(24, 48)
    wanted = reference.kernel_attention(token_standardise(q), token_standardise(k), v, KERNELS[kernel])
    uniform = reference.feature_attention(torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1]), v)
    options = ESTIMATORS[estimator] | {"kernel": kernel, "num_features": 4096}
    got = build(1, **options).double()(q, k, v)
    assert rel_error(got, wanted) < 0.3 * rel_error(uniform, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_monomials_of_low_degrees_come_closer_with_each_degree(qkv, rel_error, kernel):
    q, k, v = qkv(24, 48)
    wanted = reference.kernel_attention(token_standardise(q), token_standardise(k), v, KERNELS[kernel])
    whole = [math.comb(7 + n, n) for n in range(5)]
    errors = [rel_error(build(counts=whole[:most], kernel=kernel).double()(q, k, v), wanted) for most in (2, 3, 4, 5)]
    assert all(after < 0.5 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.02
    assert rel_error(build(kernel=kernel).double()(q, k, v), wanted) == pytest.approx(errors[1])  # all 45 fit into 128


@pytest.mark.parametrize("causal", [False, True])
def test_taylor_as_estimator_is_the_mechanism_taylor_after_standardising(qkv, rel_error, causal):
    q, k, v = qkv(30, 40)
    taylor = maclin.mechanism("taylor", head_dim=8, num_heads=4, num_kv_heads=2, kernel="log").double()
    mech = build(estimator="taylor", kernel="log", num_features=9).double()
    wanted = taylor(token_standardise(q), token_standardise(k), v, is_causal=causal)
    assert rel_error(mech(q, k, v, is_causal=causal), wanted) < 1e-10
    assert not list(mech.buffers())
    mech.resample_()  # nothing to draw
    assert mech.feature_map(k).shape[-1] == 9


@estimators
def test_kernels_differ_and_trigh_is_exp(qkv, rel_error, estimator):
    q, k, v = qkv(24, 48)
    kernels = ("exp", "trigh") if estimator == "centred" else tuple(KERNELS)
    options = ESTIMATORS[estimator]
    out = {name: build(2, kernel=name, **options).double()(q, k, v, scale=0.5) for name in kernels}
    assert rel_error(out["trigh"], out["exp"]) < 1e-12
    # exp, inv and log have the same a_0 and a_1, exp and log the same a_2; what is left out cannot tell them apart
    same = {"taylor": ("inv", "log"), "stratified": ("log",), "centred": ("inv", "log", "sqrt")}.get(estimator, ())
    for name in same:
        assert name not in out or rel_error(out[name], out["exp"]) < 1e-12
    names = [name for name in ("exp", "inv", "log", "sqrt") if name not in same]
    least = 2e-4 if estimator == "counts" else 2e-3
    for i, one in enumerate(names):
        for other in names[:i]:
            assert rel_error(out[one], out[other]) > least, (one, other)


@pytest.mark.parametrize("estimator", ["published", "stratified", "unbiased"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_learned_temperature_starts_where_t_fills_the_domain(qkv, rel_error, kernel, estimator):
    q, k, v = qkv(24, 48)
    options = ESTIMATORS[estimator] | {"kernel": kernel}
    start = 8**0.5 if kernel in ("exp", "trigh") else 1.0  # |t| <= 1, or as with a fixed one
    learned = build(3, temperature="learned", **options).double()
    torch.testing.assert_close(learned.temperature(8**-0.5), torch.full((4,), start, dtype=torch.float64))
    (grad,) = torch.autograd.grad(learned(q, k, v).square().sum(), learned.get_parameter("log_temperature"))
    assert float(grad.abs().min()) > 0
    with torch.no_grad():
        learned.get_parameter("log_temperature").zero_()
    fixed = build(3, **options).double()
    assert rel_error(learned(q, k, v), fixed(q, k, v)) < 1e-12


@pytest.mark.parametrize("kernel", ["inv", "log", "sqrt"])
@pytest.mark.parametrize("theta", [-1000.0, -5.0, 5.0, 50.0, 1000.0])
@pytest.mark.parametrize("scale", [0.1, 8**-0.5, 0.54])
def test_a_learned_temperature_keeps_t_inside_the_domain(qkv, kernel, theta, scale):
    mech = build(4, kernel=kernel, temperature="learned")
    with torch.no_grad():
        mech.get_parameter("log_temperature").fill_(theta)
    temperature = mech.temperature(scale)
    assert temperature is not None
    assert float((temperature * scale).detach().max()) < 0.9501 / math.sqrt(3) * KERNELS[kernel].radius
    q, k, v = qkv(10, 12, dtype=torch.float32)
    assert bool(mech(q, k, v, scale=scale).isfinite().all())


def test_a_learned_temperature_sharpens(qkv, rel_error):
    q, k, v = qkv(24, 48)
    mech = build(5, estimator="kar_karnick", num_features=20_000, temperature="learned").double()
    with torch.no_grad():
        mech.get_parameter("log_temperature").copy_(torch.tensor([0.0, 0.5, 1.0, 1.5]))
    factor = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64).exp()[:, None, None]
    wanted = reference.kernel_attention(token_standardise(q) * factor, token_standardise(k), v, KERNELS["exp"])
    flat = reference.kernel_attention(token_standardise(q), token_standardise(k), v, KERNELS["exp"])
    got = mech(q, k, v)
    for head in range(1, 4):
        assert rel_error(got[:, head], wanted[:, head]) < 0.5 * rel_error(flat[:, head], wanted[:, head])


@estimators
@pytest.mark.parametrize("temperature", ["fixed", "learned"])
@pytest.mark.parametrize("scale", [0.56, 1.0, 3.0])
def test_a_scale_that_leaves_the_domain_is_refused(qkv, scale, temperature, estimator):
    if estimator == "centred":
        return
    mech = build(kernel="inv", temperature=temperature, **ESTIMATORS[estimator])
    message = r"scale \S+ lets t come too near to the radius 1 of kernel 'inv': wanted a scale below 0.548"
    q, k, v = qkv(40, 40, dtype=torch.float32)
    for call in (mech, partial(maclin.calibrate, mech), mech.predicted_rel_error):
        with pytest.raises(InputError, match=rf"{message}.*pass a smaller scale or kernel='exp'"):
            call(q, k, v, scale=scale)


@pytest.mark.parametrize("kernel", ["inv", "log", "sqrt"])
def test_a_finite_radius_needs_ppsbn(kernel):
    with pytest.raises(OptionError, match=rf"'{kernel}' is defined for \|t\| < 1 only.*ppsbn='token' or 'batch'"):
        build(kernel=kernel, ppsbn=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "best"}, "estimator is 'best'; known are 'stratified', 'published', 'kar_karnick', 'taylor'"),
        ({"ppsbn": True}, "ppsbn is True; known are 'token', 'batch', False"),
        ({"temperature": 2.0}, "temperature is 2.0; known are 'fixed', 'learned'"),
        ({"num_features": 1, "estimator": "published"}, "num_features is 1; wanted an integer of at least 2$"),
        ({"num_features": 8, "estimator": "taylor"}, "num_features is 8; wanted an integer of at least 9$"),
    ],
)
def test_options_that_are_not_known_list_the_known(options, message):
    with pytest.raises(OptionError, match=f"macformer: {message}"):
        build(**options)


@estimators
def test_batch_statistics_use_the_batch_in_train_mode_and_the_running_ones_in_eval(qkv, key_mask, rel_error, estimator):
    q, k, v = qkv(30, 30)
    mask = key_mask("right", 30)
    options = ESTIMATORS[estimator]
    mech = build(6, ppsbn="batch", **options).double()
    raw = build(6, ppsbn=False, **options).double()  # the same draw

    def standardised(of_q: tuple[Tensor, Tensor], of_k: tuple[Tensor, Tensor]) -> Tensor:
        return raw(batch_standardise(q, *of_q), batch_standardise(k, *of_k), v, key_mask=mask)

    of_batch = standardised(batch_moments(q, mask), batch_moments(k, mask))
    running = standardised(*((torch.zeros(h, 8).double(), torch.ones(h, 8).double()) for h in (4, 2)))
    mech.eval()
    assert rel_error(mech(q, k, v, key_mask=mask), running) < 1e-10
    mech.train()
    assert rel_error(mech(q, k, v, key_mask=mask), of_batch) < 1e-10
    mech.eval()
    assert rel_error(mech(q, k, v, key_mask=mask), running) > 1e-6  # they have moved


def test_batch_statistics_cannot_be_trained_causally(qkv):
    q, k, v = qkv(5, 5)
    mech = build(ppsbn="batch").double()
    before = copy.deepcopy(mech.state_dict())
    with pytest.raises(CapabilityError, match=r"ppsbn='batch' cannot be trained with is_causal=True.*ppsbn='token'"):
        mech(q, k, v, is_causal=True)
    assert all(torch.equal(x, before[name]) for name, x in mech.state_dict().items())
    assert mech.eval()(q, k, v, is_causal=True).shape == (2, 4, 5, 5)


@estimators
def test_ppsbn_ends_with_the_learned_power(qkv, rel_error, estimator):
    q, k, v = qkv(20, 20)
    options = ESTIMATORS[estimator]
    mech = build(7, **options).double()
    before = mech(q, k, v)
    with torch.no_grad():
        mech.get_parameter("post.beta").fill_(0.5)
        mech.get_parameter("post.gamma").copy_(torch.tensor([1.0, 2.0, -1.0, 0.0]))
    gamma = torch.tensor([1.0, 2.0, -1.0, 0.0])[:, None, None]
    for causal, plain in ((False, before), (True, build(7, **options).double()(q, k, v, is_causal=True))):
        wanted = (
            gamma
            * plain.sign()
            * (plain.square() + 1e-6).sqrt().sqrt()
            * (plain.square() / (1e-6 + plain.square())).sqrt()
        )
        assert rel_error(mech(q, k, v, is_causal=causal), wanted.detach()) < 1e-6
    assert build(ppsbn=False).post is None


@estimators
def test_calibrate_sets_the_running_statistics_of_a_copy(qkv, key_mask, estimator):
    q, k, v = qkv(60, 60)
    mask = key_mask("left", 60)
    mech = build(ppsbn="batch", **ESTIMATORS[estimator])
    before = copy.deepcopy(mech.state_dict())
    calibrated = maclin.calibrate(mech, q, k, v, mask)
    assert all(torch.equal(x, before[name]) for name, x in mech.state_dict().items())
    found = calibrated.state_dict()
    for name, x in (("q_statistics", q), ("k_statistics", k)):
        mean, variance = batch_moments(x, mask)
        torch.testing.assert_close(found[f"{name}.running_mean"], mean.float())
        torch.testing.assert_close(found[f"{name}.running_var"], variance.float())
    if estimator in DEGREE_LAWS:
        assert torch.equal(found["map.directions"], before["map.directions"])


def test_calibrate_needs_a_token(qkv):
    q, k, v = qkv(3, 3)
    with pytest.raises(InputError, match="no token to calibrate on"):
        maclin.calibrate(build(), q, k, v, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="no token to calibrate on"):
        maclin.calibrate(build(), q, k[:, :, :0], v[:, :, :0])


@pytest.mark.parametrize("estimator", DRAWN)
def test_a_state_dict_carries_the_draw(qkv, estimator):
    q, k, v = qkv(10, 12, dtype=torch.float32)
    one, other = build(8, **ESTIMATORS[estimator]), build(9, **ESTIMATORS[estimator])
    assert one.map.get_buffer("directions").shape != other.map.get_buffer("directions").shape
    assert not torch.equal(one(q, k, v), other(q, k, v))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(one(q, k, v), other(q, k, v))
    again = copy.deepcopy(other)
    assert torch.equal(one(q, k, v), again(q, k, v))


@pytest.mark.parametrize("estimator", DRAWN)
def test_a_state_dict_inside_a_model_and_one_that_does_not_fit(estimator):
    options = ESTIMATORS[estimator]
    models = [[build(seed, **options), build(seed + 1, **options)] for seed in (10, 20)]
    torch.nn.ModuleList(models[1]).load_state_dict(torch.nn.ModuleList(models[0]).state_dict())
    for one, two in zip(*models, strict=True):
        assert torch.equal(one.map.get_buffer("directions"), two.map.get_buffer("directions"))
        assert one.map.map == two.map.map
    small, large = (build(**(options | {"num_features": m})) for m in (32, 64))
    with pytest.raises(RuntimeError, match=r"size mismatch for map\.degrees"):
        large.load_state_dict(small.state_dict())


@pytest.mark.parametrize("estimator", DRAWN)
def test_an_incomplete_state_dict_leaves_the_draw_whole(estimator):
    mech, other = (build(seed, **ESTIMATORS[estimator]) for seed in (11, 12))
    before, degrees = mech.map.get_buffer("directions").clone(), other.state_dict()["map.degrees"]
    result = mech.load_state_dict({"map.degrees": degrees}, strict=False)
    assert "map.directions" in result.missing_keys
    assert torch.equal(mech.map.get_buffer("directions"), before)


@estimators
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_map(qkv, dtype, estimator):
    mech = build(13, temperature="learned", **ESTIMATORS[estimator])
    half = copy.deepcopy(mech).to(dtype)
    for name, buffer in mech.map.named_buffers():
        assert half.map.get_buffer(name).dtype == buffer.dtype
        assert torch.equal(half.map.get_buffer(name), buffer)
    assert half.get_parameter("log_temperature").dtype == dtype
    q, k, v = qkv(10, 12, dtype=torch.float32)
    out = half(*(x.to(dtype) for x in (q, k, v)))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), mech(q, k, v), rtol=0, atol=0.05)


@pytest.mark.parametrize("estimator", DRAWN)
def test_resample_draws_anew_and_stays_consistent(qkv, estimator):
    q, k, v = qkv(10, 12)
    options = ESTIMATORS[estimator] | {"num_features": 128}
    mech = build(14, **options).double()
    before = mech(q, k, v)
    mech.resample_(torch.Generator().manual_seed(15))
    directions, degrees = mech.map.get_buffer("directions"), mech.map.get_buffer("degrees")
    assert directions.dtype == torch.float64
    assert directions.shape == (2, 8, int(degrees.sum()))
    assert len(degrees) == 128
    assert not torch.equal(mech(q, k, v), before)
    torch.testing.assert_close(mech(q, k, v), build(15, **options).double()(q, k, v), rtol=1e-6, atol=1e-6)
    mech.resample_(torch.Generator().manual_seed(14))
    assert torch.equal(mech(q, k, v), before)


@pytest.mark.parametrize("estimator", ["taylor", "stratified", "counts", "centred"])
def test_without_a_draw_there_is_nothing_to_resample(qkv, estimator):
    q, k, v = qkv(10, 12)
    mech = build(14, **ESTIMATORS[estimator]).double()
    before = mech(q, k, v)
    mech.resample_(torch.Generator().manual_seed(15))
    assert torch.equal(mech(q, k, v), before)
    assert torch.equal(build(15, **ESTIMATORS[estimator]).double()(q, k, v), before)


@pytest.mark.parametrize("estimator", DRAWN)
def test_one_draw_for_each_key_head(qkv, estimator):
    mech = build(16, **ESTIMATORS[estimator])
    directions = mech.map.get_buffer("directions")
    assert not torch.equal(directions[0], directions[1])
    q, k, v = qkv(6, 9, dtype=torch.float32)
    same = q[:, :1].expand(-1, 4, -1, -1)
    out = mech(same, k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1))
    torch.testing.assert_close(out[:, 0], out[:, 1])
    assert not torch.allclose(out[:, 0], out[:, 2], rtol=1e-3)


@estimators
def test_the_configuration_builds_the_like_again(qkv, estimator):
    kernel = "trigh" if estimator == "centred" else "log"
    mech = build(3, kernel=kernel, ppsbn="batch", temperature="learned", **ESTIMATORS[estimator]).eval()
    config = json.loads(json.dumps(mech.config))
    again = maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2, **config).eval()
    again.load_state_dict(mech.state_dict())
    assert again.config == mech.config
    q, k, v = qkv(10, 12, dtype=torch.float32)
    assert torch.equal(again(q, k, v), mech(q, k, v))
