"""maclin.calibrate for macformer: tolerances that hold on other data, what is said, and what must not matter."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import reference
from maclin.core.kernels import KERNELS
from maclin.core.mechanisms.macformer import Macformer
from maclin.core.norms import token_standardise


def build(head_dim: int = 8, num_heads: int = 2, num_kv_heads: int = 1, **options: Any) -> Macformer:
    options = {"ppsbn": False} | options
    return Macformer(head_dim, num_heads, num_kv_heads, **options).double()


def calibrate(mech: Macformer, *tensors: Tensor | None, **arguments: Any) -> Macformer:
    made = maclin.calibrate(mech, *tensors, **arguments)  # pyright: ignore[reportArgumentType]
    assert isinstance(made, Macformer)
    return made


def same(one: Macformer, other: Macformer) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.allclose(x.double(), states[1][name].double(), rtol=1e-6, atol=1e-9) for name, x in states[0].items()
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kind", "radius"), [("aligned", 0.5), ("aligned", 1.5), ("isotropic", 1.0)])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
def test_a_tolerance_is_kept_on_other_draws(problem, rel_error, tolerance, kind, radius, causal):
    sizes = {"heads": 2, "kv_heads": 1, "n": 128}
    data = problem(kind, radius, batch=18, **sizes)
    mech = calibrate(build(num_features="auto", tolerance=tolerance), *data, is_causal=causal)
    found = mech.calibration
    assert found is not None
    assert found.tolerance == tolerance
    assert found.reached
    assert found.bound is not None
    assert found.rel_error <= found.bound <= tolerance
    assert found.num_features == mech.num_features == mech.map.num_features == sum(found.counts)
    q, k, v = problem(kind, radius, seed=1, batch=24, **sizes)
    error = rel_error(mech(q, k, v, is_causal=causal), reference.softmax_attention(q, k, v, is_causal=causal))
    assert error <= tolerance


def test_a_smaller_tolerance_takes_more_features(problem):
    data = problem("aligned", 1.5, heads=2)
    used = [
        calibrate(build(num_features="auto", tolerance=x), *data).num_features for x in (0.5, 0.1, 0.03, 0.01, 0.001)
    ]
    assert used == sorted(used)
    assert used[0] == 9
    assert 20 < used[2] < used[-1] <= 128


def test_what_cannot_be_reached_is_said_with_the_radius(problem):
    q, k, v = problem("isotropic", 30.0, heads=2)
    found = calibrate(build(num_features="auto", tolerance=0.01), q, k, v).calibration
    assert found is not None
    assert found.reached is False
    assert found.bound is not None
    assert found.bound > found.rel_error > 0.01
    assert found.radius[0] == pytest.approx(30, rel=0.2)
    assert found.note[0] == (
        f"no number of features up to 128 brings the error to 0.01: it stays at {found.rel_error:.2g}, and up to "
        f"{found.bound:.2g} on other sequences, because the radius is {found.radius[0]:.2g}; "
        "keep this layer exact or take another mechanism"
    )


def uneven(problem: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Documents of which every fourth has logits of four times the size."""
    q, k, v = problem("aligned", 1.0, batch=12, n=40)
    return q * (1 + 3 * (torch.arange(12) % 4 == 3))[:, None, None, None].double(), k, v


def test_a_number_that_costs_too_much_to_be_sure_of_is_refused_and_said(problem):
    data = uneven(problem)
    made = calibrate(build(num_heads=1, num_features="auto", tolerance=0.1), *data)
    found = made.calibration
    assert found is not None
    assert found.least is not None
    assert found.bound is not None
    assert found.rel_error < found.bound <= 0.1
    assert made.num_features > 1.25 * found.least
    assert found.reached is False
    assert found.note == (
        f"{found.least} features bring the error of these sequences to 0.1, but to be 95 % sure of as many others "
        f"takes {made.num_features}; calibrate on more sequences or pass a lower confidence, or take them with "
        f"num_features={made.num_features}",
    )
    taken = calibrate(build(num_heads=1, num_features=made.num_features), *data).calibration
    assert taken is not None
    assert taken.counts == pytest.approx(found.counts, abs=8)


def test_the_confidence_is_paid_for_with_features(problem):
    data = uneven(problem)
    used, bounds, found = list[int](), list[float](), None
    for confidence in (0.5, 0.9, 0.999):
        made = calibrate(build(num_heads=1, num_features="auto", tolerance=0.1, confidence=confidence), *data)
        found = made.calibration
        assert found is not None
        assert found.bound is not None
        used.append(made.num_features)
        bounds.append(found.bound)
        assert found.reached == (found.bound <= 0.1 and used[-1] <= 1.25 * used[0])
        assert found.least == used[0]  # half: what the sequences themselves ask for
        assert made.config["confidence"] == 0.95  # of what has a number now
        assert maclin.mechanism("macformer", head_dim=8, num_heads=1, **made.config) is not None
    assert used == sorted(used)
    assert used[1] > 1.1 * used[0]
    assert bounds[-1] > 0.1
    assert found is not None
    assert found.note[0].endswith(
        f"sure of as many others takes more than 128 (their error may be {bounds[-1]:.2g}); calibrate on more "
        "sequences or pass a lower confidence"
    )


def test_degrees_0_and_1_alone_are_said(problem):
    q, k, v = problem("isotropic", 0.3, heads=2, d=32, n=128)
    found = calibrate(build(32, num_features=40), q, k, v).calibration
    assert found is not None
    assert found.counts == (1, 32)
    assert found.note == (
        "uses the 33 features of degrees 0 and 1 out of 40: more would bring the error down by less than 5 %",
    )
    asked = calibrate(build(32, counts=(1, 32), num_features=40), q, k, v).calibration
    assert asked is not None
    assert asked.note == ()
    more = calibrate(build(32, num_features=500), q, k, v).calibration
    assert more is not None
    assert more.counts[:2] == (1, 32)
    assert sum(more.counts) > 100
    assert more.note == ()


@pytest.mark.parametrize("centred", ["exp", "inv"])
def test_the_radius_is_that_of_what_is_left(problem, centred):
    q, k, v = problem("aligned", 0.3, shift=0.8, n=40)
    found = calibrate(build(num_heads=1, kernel=centred, ppsbn=False if centred == "exp" else "token"), q, k, v)
    assert found.calibration is not None
    x, y = (x * 8**-0.25 for x in found.normalised(q, k))
    shift = [found.map.get_buffer(name)[0] * 8**-0.25 for name in ("q_centre", "k_centre")]
    wanted = math.prod(float((t - c).norm(dim=-1).max()) for t, c in zip((x, y), shift, strict=True))
    assert found.calibration.radius[0] == pytest.approx(wanted, rel=1e-5)
    assert (float(shift[0].norm()) > 0) == (centred == "exp")


@pytest.mark.parametrize("kernel", ["exp", "inv"])
def test_a_learned_temperature_is_the_least_squares_fit(qkv, kernel):
    q, k, v = qkv(50, 50, batch=5)
    q = q * torch.tensor([0.1, 0.2, 0.4, 0.8])[:, None, None].double()
    mech = calibrate(Macformer(8, 4, 2, kernel=kernel, temperature="learned").double(), q, k, v)
    x, y = token_standardise(q), token_standardise(k)
    mech.requires_grad_(False)
    found = mech.calibration
    assert found is not None
    got = mech.temperature(8**-0.5)
    assert got is not None
    limit = math.inf if kernel == "exp" else 0.99 * 0.95 / math.sqrt(3) * math.sqrt(8)
    for head in range(4):
        rows = [(a[b, head] @ c[b, head // 2].mT) for b in range(5) for a, c in ((q, k), (x, y))]
        target, fitted = (
            np.concatenate([(row - row.mean(1, keepdim=True)).flatten().numpy() for row in part])
            for part in (rows[::2], rows[1::2])
        )
        (wanted,), *_ = np.linalg.lstsq(fitted[:, None], target, rcond=None)
        assert found.temperature[head] == pytest.approx(min(wanted, limit), rel=1e-6)
        assert float(got[head]) == pytest.approx(min(wanted, limit), rel=1e-6)
    assert kernel == "exp" or found.temperature[3] == pytest.approx(limit)


@pytest.mark.parametrize("rows", [40, 13])
def test_a_causal_temperature_is_fitted_to_the_logits_that_are_seen(qkv, rows):
    q, k, v = qkv(rows, 40, batch=3)
    k[:, :, 25:] *= 3.0  # late keys, which few rows see
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, :9] = False
    mech = calibrate(Macformer(8, 4, 2, temperature="learned").double(), q, k, v, mask, is_causal=True)
    x, y = token_standardise(q), token_standardise(k)
    assert mech.calibration is not None
    for head in range(4):
        target, fitted = list[Tensor](), list[Tensor]()
        for b in range(3):
            for i in range(rows):
                seen = [j for j in range(i + 40 - rows + 1) if mask[b, j]]
                if rows == 40 and not mask[b, i]:
                    continue
                for part, a, c in ((target, q, k), (fitted, x, y)):
                    logits = c[b, head // 2, seen] @ a[b, head, i]
                    part.append(logits - logits.mean())
        (wanted,), *_ = np.linalg.lstsq(torch.cat(fitted)[:, None].numpy(), torch.cat(target).numpy(), rcond=None)
        assert mech.calibration.temperature[head] == pytest.approx(wanted, rel=1e-6)
    free = calibrate(Macformer(8, 4, 2, temperature="learned").double(), q, k, v, mask).calibration
    assert free is not None
    assert free.temperature != pytest.approx(mech.calibration.temperature, rel=1e-2)


@pytest.mark.parametrize("kernel", ["exp", "auto"])
def test_what_is_drawn_follows_from_the_mechanism_alone(problem, kernel):
    """Whatever state torch's generator is in, which stays as it is; another draw of the mechanism gives another."""
    q, k, v = problem("aligned", 0.5, heads=2)

    def drawn(seed: int) -> Macformer:
        generator = torch.Generator().manual_seed(seed)
        return build(unbiased=True, num_features=40, kernel=kernel, ppsbn="token", generator=generator)

    made = []
    for seed in (1, 1, 2):
        mech = drawn(seed)
        before = torch.random.get_rng_state()
        made.append(calibrate(mech, q, k, v))
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(3)
    assert same(made[0], made[1])
    assert not torch.equal(made[0].map.get_buffer("directions"), made[2].map.get_buffer("directions"))
    half = calibrate(drawn(1).float(), *(x.float() for x in (q, k, v)))
    assert torch.equal(half.map.get_buffer("directions").double(), made[0].map.get_buffer("directions"))


def test_a_temperature_brings_the_output_nearer_to_softmax(problem, rel_error):
    q, k, v = problem("aligned", 2.0, heads=2)
    wanted = reference.softmax_attention(q, k, v)
    fixed, learned = (
        calibrate(build(ppsbn="token", temperature=x), q, k, v)(q, k, v).detach() for x in ("fixed", "learned")
    )
    assert rel_error(learned, wanted) < 0.5 * rel_error(fixed, wanted)


def test_the_kernel_nearest_to_softmax_is_picked(problem, rel_error):
    q, k, v = problem("aligned", 2.0, heads=2, n=96)
    mech = build(kernel="auto", ppsbn="token", temperature="learned")
    assert mech.kernel.name == "exp"
    made = calibrate(mech, q, k, v)
    found = made.calibration
    assert found is not None
    names, errors = zip(*found.kernels, strict=True)
    assert sorted(names) == ["exp", "inv", "log", "sqrt"]
    assert list(errors) == sorted(errors)
    assert made.config["kernel"] == made.kernel.name == names[0] == "exp"
    assert mech.config["kernel"] == "auto"
    assert rel_error(made(q, k, v), reference.softmax_attention(q, k, v)) < 2 * errors[0] + 0.01
    assert all(math.isfinite(error) for error in errors)
    fixed = calibrate(build(kernel="auto", ppsbn="token"), q, k, v)  # logits beyond 1/sqrt(8) want a steeper kernel
    assert fixed.config["kernel"] == "inv"


def test_the_kernel_is_exp_where_no_other_can_be(problem):
    q, k, v = problem("aligned", 0.5, heads=2)
    for ppsbn, scale in ((False, None), ("token", 0.9)):
        found = calibrate(build(kernel="auto", ppsbn=ppsbn), q, k, v, scale=scale).calibration
        assert found is not None
        assert [name for name, _ in found.kernels] == ["exp"]


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "taylor"},
        {"estimator": "published", "ppsbn": "batch"},
        {"estimator": "kar_karnick", "ppsbn": "token"},
        {"ppsbn": "batch", "temperature": "learned"},
        {"unbiased": True, "ppsbn": "batch"},
    ],
    ids=str,
)
def test_any_estimator_may_look_for_its_kernel(problem, options: dict[str, Any]):
    """In train mode and causally as well, with padding and a sequence of nothing but it."""
    q, k, v = problem("aligned", 0.5, heads=2)
    mask = torch.ones(6, 64, dtype=torch.bool)
    mask[2], mask[4, 40:] = False, False
    mech = build(kernel="auto", **options)
    with torch.no_grad():
        for parameter in mech.parameters():
            parameter.fill_(0.7)
    made = calibrate(mech, q, k, v, mask, is_causal=True)
    assert made.training
    assert made.config["kernel"] == made.kernel.name == made.map.kernel.name != "auto"
    if made.calibration is not None:
        assert all(math.isfinite(error) for _, error in made.calibration.kernels)
    for name, x in mech.state_dict().items():
        if name.startswith("post") or (name.startswith("map") and "estimator" in options):
            assert torch.equal(made.state_dict()[name], x)  # what was drawn or trained stays


@pytest.mark.parametrize("kernel", ["inv", "log", "sqrt"])
@pytest.mark.parametrize("theta", [None, -50.0, 0.0, 3.0, 50.0])
@pytest.mark.parametrize("scale", [0.05, 8**-0.5, 0.54])
def test_a_finite_radius_is_kept_whatever_the_parameter(qkv, kernel, theta, scale):
    q, k, v = qkv(40, 40)
    mech = calibrate(Macformer(8, 4, 2, kernel=kernel, temperature="learned").double(), 9 * q, k, v, scale=scale)
    if theta is not None:
        with torch.no_grad():
            mech.get_parameter("log_temperature").fill_(theta)
    temperature = mech.temperature(scale)
    assert temperature is not None
    assert float(temperature.detach().max()) * scale < 0.9501 / math.sqrt(3)
    x, y = mech.normalised(q, k, scale)
    t = scale * x @ y.repeat_interleave(2, 1).mT
    assert float(t.detach().abs().max()) < 0.9501 / math.sqrt(3)
    assert bool(mech(q, k, v, scale=scale).isfinite().all())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "auto": {"num_features": "auto", "tolerance": 0.05},
    "kernel": {"kernel": "auto", "ppsbn": "token"},
    "batch": {"ppsbn": "batch", "temperature": "learned", "kernel": "log"},
    "unbiased": {"unbiased": True},
    "published": {"estimator": "published", "ppsbn": "batch", "temperature": "learned"},
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
def test_padding_changes_nothing(problem, case, causal, side):
    q, k, v = problem("aligned", 0.5, heads=2, n=40)
    junk = [
        50 * torch.randn(6, x.shape[1], 11, 8, generator=torch.Generator().manual_seed(1)).double() for x in (q, k, v)
    ]
    order = slice(None) if side == "right" else slice(None, None, -1)
    padded = [torch.cat([x, pad][order], dim=2) for x, pad in zip((q, k, v), junk, strict=True)]
    mask = torch.cat([torch.ones(6, 40, dtype=torch.bool), torch.zeros(6, 11, dtype=torch.bool)][order], dim=1)
    mech = build(**OPTIONS[case])
    found = []
    for tensors, key_mask in (((q, k, v), None), (padded, mask)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(2)
            found.append(calibrate(mech, *tensors, key_mask, is_causal=causal))
    plain, other = found
    assert same(plain, other)
    assert plain.config == other.config
    if plain.calibration is not None:
        assert other.calibration is not None
        assert other.calibration.rel_error == pytest.approx(plain.calibration.rel_error, rel=1e-6)
        assert other.calibration.highest == plain.calibration.highest


def test_a_sequence_of_nothing_but_padding_changes_nothing(problem):
    q, k, v = problem("aligned", 0.5, heads=2, n=40)
    empty = [torch.cat([x, 99 * x[:1]]) for x in (q, k, v)]
    mask = torch.ones(7, 40, dtype=torch.bool)
    mask[6] = False
    assert same(calibrate(build(), q, k, v), calibrate(build(), *empty, mask))


def test_grouped_heads_are_served_together(problem, rel_error):
    """The group's queries decide together: as one head that asks all of them."""
    q, k, v = problem("aligned", 1.0, heads=4, kv_heads=2, n=24)
    grouped = calibrate(build(num_heads=4, num_kv_heads=2, num_features=25), q, k, v)
    for head in (0, 1):
        asked = q[:, 2 * head : 2 * head + 2].flatten(1, 2)[:, None]
        alone = calibrate(
            build(num_heads=1, num_features=25, counts=grouped.calibration.counts),  # pyright: ignore
            asked,
            k[:, head : head + 1],
            v[:, head : head + 1],
        )
        basis = [m.map.get_buffer("q_basis")[i] for m, i in ((grouped, head), (alone, 0))]
        torch.testing.assert_close(*(b.abs() for b in basis), rtol=1e-6, atol=1e-8)
        out = grouped(q, k, v)[:, 2 * head : 2 * head + 2].flatten(1, 2)[:, None]
        assert rel_error(alone(asked, k[:, head : head + 1], v[:, head : head + 1]), out) < 1e-5


def test_cross_attention_and_other_lengths(problem, rel_error):
    q, k, v = problem("aligned", 1.0, heads=2, n=64)
    for rows, causal in ((10, False), (10, True), (1, True)):
        mech = calibrate(build(num_features=60), q[:, :, -rows:], k, v, is_causal=causal)
        wanted = reference.softmax_attention(q[:, :, -rows:], k, v, is_causal=causal)
        assert rel_error(mech(q[:, :, -rows:], k, v, is_causal=causal), wanted) < 0.06


def test_the_kernels_are_different_functions(problem, rel_error):
    """At radius 1/2 each estimate is nearest to its own kernel."""
    q, k, v = problem("aligned", 3.0, heads=1, n=128, d=32)
    names = ("exp", "inv", "log", "sqrt")
    estimates, exact = {}, {}
    for name in names:
        mech = calibrate(build(32, 1, kernel=name, num_features=256, ppsbn="token"), q, k, v, scale=0.5)
        estimates[name] = mech(q, k, v, scale=0.5).detach()
        x, y = mech.normalised(q, k)
        exact[name] = reference.kernel_attention(x, y, v, KERNELS[name], scale=0.5)
    for name in names:
        errors = {other: rel_error(estimates[name], exact[other]) for other in names}
        own = errors.pop(name)
        assert own < 0.5 * min(errors.values()), (name, own, errors)
    trigh = calibrate(build(32, 1, kernel="trigh", num_features=256, ppsbn="token"), q, k, v, scale=0.5)
    assert rel_error(trigh(q, k, v, scale=0.5), estimates["exp"]) < 1e-6
