"""Closed-form errors of the output, against enumeration of all signs and against simulation."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import design, reference
from maclin.core.kernels import KERNELS
from maclin.core.mechanisms.macformer import Macformer
from maclin.core.prediction import OutputMoments


@pytest.fixture(autouse=True)
def all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is left out: what is left is no error of sampling."""
    monkeypatch.setattr(design, "_ROWS", 10_000)
    monkeypatch.setattr("maclin.core.prediction._ROWS", 10_000)


RANDOM: dict[str, dict[str, Any]] = {
    "published": {"estimator": "published"},
    "kar_karnick": {"estimator": "kar_karnick"},
    "unbiased": {"unbiased": True},
}


def build(num_features: int = 64, head_dim: int = 8, seed: int = 0, **options) -> Macformer:
    generator = torch.Generator().manual_seed(seed)
    return Macformer(head_dim, 1, ppsbn=False, num_features=num_features, generator=generator, **options).double()


def tiny() -> tuple[design.Document, design.Basis]:
    """One query, four keys, D = 3, in bases that are not the axes."""
    generator = torch.Generator().manual_seed(0)
    x, y, v = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (1, 4, 4))
    doc = design.Document(0.5 * x, 0.7 * y, v)
    queries = torch.randn(9, 3, generator=generator, dtype=torch.float64) + 0.5
    return doc, design.basis_of([design.Document(queries, 0.7 * y, v)], True)


SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)


def shifts(degree: int) -> tuple[Tensor, design.Exact, Tensor]:
    """sum_j (product of <r, u> <r, w_j>) d_j for every choice of ``degree`` sign vectors; exact attention; d."""
    doc, basis = tiny()
    exact = design.Exact(doc, basis, KERNELS["exp"])
    t = (doc.x - basis.q_centre) @ (doc.y - basis.k_centre).mT
    weights = t.exp() * ((doc.y - basis.k_centre) @ basis.q_centre).exp()
    out = weights @ doc.v / weights.sum()
    d = (weights / t.exp() / weights.sum()).mT * (doc.v - out)
    products = (exact.u @ SIGNS.mT).mT * (exact.w @ SIGNS.mT).mT  # (8, keys)
    estimates = torch.ones(1, 4, dtype=torch.float64)
    for _ in range(degree):
        estimates = (estimates[:, None] * products[None]).flatten(0, 1)
    return estimates @ d, exact, d


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_the_variance_of_a_degree_is_that_of_all_signs(degree):
    doc, basis = tiny()
    moments = OutputMoments([doc], basis, KERNELS["exp"], 5)
    moved, exact, _ = shifts(degree)
    assert moments.square == pytest.approx(float(exact.out.square().sum()))
    assert float(moments.second[degree]) == pytest.approx(float(moved.square().sum(-1).mean()))
    wanted = float((moved - moved.mean(0)).square().sum(-1).mean())
    assert moments.of_degree(degree) == pytest.approx(wanted, abs=1e-12)


def test_the_variance_of_a_law_is_that_of_all_degrees_and_signs():
    doc, basis = tiny()
    kernel, law = KERNELS["exp"], {0: 0.2, 1: 0.5, 3: 0.3}
    moments = OutputMoments([doc], basis, kernel, 5)
    mean = torch.zeros(3, dtype=torch.float64)
    square = 0.0
    for degree, p in law.items():
        moved = kernel.coefficient(degree) / p * shifts(degree)[0]
        mean += p * moved.mean(0)
        square += p * float(moved.square().sum(-1).mean())
    assert moments.of_law(kernel, law) == pytest.approx(square - float(mean.square().sum()))
    assert moments.of_law(kernel, {}) == 0


@pytest.mark.parametrize("kind", ["aligned", "isotropic"])
@pytest.mark.parametrize(("case", "calibrated"), [*((case, False) for case in RANDOM), ("unbiased", True)])
def test_the_first_order_is_that_of_many_draws(problem, case, kind, calibrated):
    """The mean of |sum_j e_j d_j|^2 over draws, e_j the error of the similarities, within its standard error."""
    q, k, v = problem(kind, 1.0, batch=1, n=24, d=6)
    mech = build(24, head_dim=6, **RANDOM[case])
    if calibrated:
        more = problem(kind, 1.0, n=40, d=6, seed=1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            mech = maclin.calibrate(mech, *more)
        assert isinstance(mech, Macformer)
    (predicted,) = mech.predicted_rel_error(q, k, v, scale=6**-0.5)
    f = ((q @ k.mT) / math.sqrt(6)).exp()
    out = f @ v / f.sum(-1, keepdim=True)
    squares = []
    centre = mech.map.get_buffer("k_centre") if case == "unbiased" else torch.zeros(1, 6).double()
    per_row = (q @ centre[0] / math.sqrt(6)).exp()[..., None]  # left out by centred features
    generator = torch.Generator().manual_seed(4)
    for _ in range(800):
        mech.resample_(generator)
        phi_q, phi_k = mech.query_map(q), mech.feature_map(k)
        errors = (phi_q @ phi_k.mT * per_row - f)[0, 0]
        moved = (errors @ v[0, 0] - errors.sum(-1, keepdim=True) * out[0, 0]) / f[0, 0].sum(-1, keepdim=True)
        squares.append(float(moved.square().sum() / out.square().sum()))
    measured = torch.tensor(squares, dtype=torch.float64)
    error = float(measured.std()) / math.sqrt(len(measured))
    assert error < 0.2 * float(measured.mean())
    assert abs(float(measured.mean()) - predicted**2) < 3.5 * error


def measured_rel_error(mech: Macformer, draws: int, q: Tensor, k: Tensor, v: Tensor) -> float:
    wanted = reference.kernel_attention(q, k, v, mech.kernel)
    generator = torch.Generator().manual_seed(5)
    squares = []
    for _ in range(draws):
        mech.resample_(generator)
        squares.append(float((mech(q, k, v) - wanted).square().sum() / wanted.square().sum()))
    return math.sqrt(sum(squares) / draws)


def check_prediction(problem: Callable[..., Any], case: str, kind: str, radius: float, draws: int) -> None:
    q, k, v = problem(kind, radius, batch=4, n=48)
    mech = build(256, **RANDOM[case])
    (predicted,) = mech.predicted_rel_error(q, k, v)
    measured = measured_rel_error(mech, draws, q, k, v)
    assert 1e-4 < measured < 1
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("kind", ["aligned", "isotropic"])
@pytest.mark.parametrize("case", RANDOM)
def test_the_prediction_is_what_is_measured(problem, case, kind):
    check_prediction(problem, case, kind, 0.6, 120)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0.2, 1.0, 1.5])
@pytest.mark.parametrize("kind", ["aligned", "isotropic"])
@pytest.mark.parametrize("case", RANDOM)
def test_the_prediction_is_what_is_measured_at_other_radii(problem, case, kind, radius):
    check_prediction(problem, case, kind, radius, 400)


def test_the_covariance_of_keys_matters(problem):
    """Without the pairs of different keys the prediction is far too small on aligned data."""
    q, k, v = problem("aligned", 1.0, batch=1, n=48)
    (doc,) = design.documents(8**-0.25 * q, 8**-0.25 * k, v, None, False, 0)
    basis = design.basis_of([doc], False)
    moments = OutputMoments([doc], basis, KERNELS["exp"], 2)
    alone = 0.0
    exact = design.Exact(doc, basis, KERNELS["exp"])
    for i in range(48):
        u, w, t = exact.u[i], exact.w, exact.w @ exact.u[i]
        d = (v[0, 0] - exact.out[i]) / exact.total[i]
        c = (w * w) @ (u @ u - 2 * u * u) + 2 * t * t
        alone += float(((c - t * t)[:, None] * d * d).sum())
    assert moments.of_degree(1) > 1.5 * alone


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"counts": (1, 8, 20, 9)}, {"kernel": "sqrt", "ppsbn": "token"}], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_exact_is_compared(problem, key_mask, options, calibrated, causal):
    """All rows of the sequences are looked at: what is predicted is the error per key head, floor included."""
    q, k, v = problem("aligned", 2.0, heads=4, kv_heads=2, n=40, shift=0.3)
    mask = key_mask("left", 40, 6)
    arguments = {"key_mask": mask, "is_causal": causal}
    mech = maclin.mechanism("macformer", head_dim=8, num_heads=4, num_kv_heads=2, **({"ppsbn": False} | options))
    if calibrated:
        mech = maclin.calibrate(mech, q, k, v, mask, is_causal=causal)
    mech = mech.double()
    assert isinstance(mech, Macformer)
    predicted = mech.predicted_rel_error(q, k, v, mask, is_causal=causal)
    x, y = mech.normalised(q, k)
    wanted = reference.kernel_attention(x, y, v, mech.kernel, scale=8**-0.5, **arguments) * mask[:, None, :, None]
    got = mech(q, k, v, **arguments).detach() * mask[:, None, :, None]
    for head in (0, 1):
        mine = slice(2 * head, 2 * head + 2)
        error = float((got[:, mine] - wanted[:, mine]).norm() / wanted[:, mine].norm())
        assert predicted[head] == pytest.approx(error, rel=1e-5)


def test_the_prediction_of_many_heads_is_that_of_each(problem):
    q, k, v = problem("aligned", 0.7, heads=4, kv_heads=2, n=40)
    mech = Macformer(8, 4, 2, ppsbn=False, unbiased=True, num_features=60)
    whole = mech.predicted_rel_error(q, k, v)
    one = Macformer(8, 2, 1, ppsbn=False, unbiased=True, num_features=60)
    for head in (0, 1):
        alone = one.predicted_rel_error(q[:, 2 * head : 2 * head + 2], k[:, head : head + 1], v[:, head : head + 1])
        assert whole[head] == pytest.approx(alone[0])


def test_degrees_above_the_usual_are_predicted(problem):
    q, k, v = problem("aligned", 0.7)
    mech = build(60, unbiased=True, counts=(1, 8, *[2] * 14))
    assert mech.predicted_rel_error(q, k, v)[0] > 0
