"""Feature maps as mechanisms run them: bias, variance and convergence, by closed forms, enumeration and draws."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from maclin.core import features
from maclin.core.fast import spec
from maclin.core.fast.maps import Maps
from maclin.core.fast.spec import Side, Spec
from maclin.core.features import DEGREE_LAWS, RandomMaclaurin, rademacher
from maclin.core.kernels import KERNELS, Kernel
from maclin.core.maps import first_order_maps, maclaurin_maps
from maclin.core.mechanisms import FeatureMechanism
from maclin.core.mechanisms.favor import Favor
from maclin.core.mechanisms.rfa import Rfa

LAWS = list(DEGREE_LAWS)
X = torch.tensor([0.35, -0.2, 0.1, 0.25, -0.05, 0.15], dtype=torch.float64)
Y = torch.tensor([0.2, -0.3, -0.1, 0.3, 0.1, 0.2], dtype=torch.float64)
T = float(X @ Y)
MU = float((X @ X) * (Y @ Y) + 2 * (T**2 - (X**2 * Y**2).sum()))


def within(values: Tensor, wanted: float, errors: float = 4.0) -> bool:
    """Whether the mean of independent values is within so many standard errors of what it should be."""
    return abs(float(values.mean()) - wanted) <= errors * float(values.std()) / math.sqrt(values.numel())


def estimates(law: str, kernel: Kernel, num_features: int, draws: int, heads: int = 1, seed: int = 0) -> Tensor:
    """<phi(x), phi(y)> for independent draws of degrees (rows) and directions (columns too)."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(draws, heads, dtype=torch.float64)
    pair = torch.stack([X, Y]).expand(1, heads, 2, -1)
    for i in range(draws):
        maclaurin = DEGREE_LAWS[law].features(kernel, DEGREE_LAWS[law].draw(num_features, generator))
        directions = rademacher((heads, len(X), maclaurin.num_directions), generator).double()
        phi = maclaurin_maps(maclaurin, directions, 1.0).of_queries(pair)
        found[i] = (phi[0, :, 0] * phi[0, :, 1]).sum(-1)
    return found


def one_feature_variance(law: str, kernel: Kernel, num_features: int) -> float:
    """Variance of the whole estimate, from E (one feature)^2 = a_n^2 mu^n / P(n)^2 given the degree n."""
    if law == "published":
        norm = sum(2.0**-n for n in range(1, 21))
        second = sum(kernel.coefficient(n) ** 2 * MU**n / (2.0**-n / norm) for n in range(1, 21))
        mean = sum(kernel.coefficient(n) * T**n for n in range(1, 21))
        return (second - mean**2) / (num_features - 1)  # the constant has no variance
    second = sum(kernel.coefficient(n) ** 2 * MU**n / 2.0 ** -(n + 1) for n in range(61))
    mean = sum(kernel.coefficient(n) * T**n for n in range(61))
    return (second - mean**2) / num_features


def test_the_pair_lies_where_every_variance_is_finite():
    assert 0.1 < T < 0.5
    assert 2 * MU < 0.8


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", KERNELS)
def test_the_estimate_is_unbiased(law, name):
    found = estimates(law, KERNELS[name], 24, draws=300, heads=6, seed=1)
    assert within(found.mean(1), float(KERNELS[name](torch.tensor(T))))
    assert float(found.std()) > 0.01


@pytest.mark.parametrize("degree", [1, 2])
def test_a_feature_over_all_signs_has_the_exact_moments(degree):
    d = 4
    x, y = X[:d], Y[:d]
    k = float(x @ y)
    mu = float((x @ x) * (y @ y) + 2 * (k**2 - (x**2 * y**2).sum()))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    chosen = torch.tensor(list(itertools.product(range(len(signs)), repeat=degree)))  # every n-tuple of directions
    directions = torch.cat([signs[chosen[:, rank]].T for rank in range(degree)], dim=-1)[None]
    maclaurin = RandomMaclaurin((degree,) * len(chosen), (1.0,) * len(chosen))
    phi = maclaurin_maps(maclaurin, directions, 1.0).of_queries(torch.stack([x, y])[None, None])[0, 0]
    product = phi[0] * phi[1]
    assert float(product.mean()) == pytest.approx(k**degree, rel=1e-12)
    assert float(product.square().mean()) == pytest.approx(mu**degree, rel=1e-12)
    variance = float(product.var(unbiased=False))
    assert variance == pytest.approx(mu**degree - k ** (2 * degree), rel=1e-10)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["exp", "inv"])
def test_the_variance_of_an_estimate_is_the_closed_form(law, name):
    found = estimates(law, KERNELS[name], 12, draws=2500, seed=2).flatten()
    squares = (found - found.mean()) ** 2
    assert within(squares, one_feature_variance(law, KERNELS[name], 12))


@pytest.mark.parametrize("law", LAWS)
def test_the_error_falls_like_one_over_the_root_of_m(law):
    sizes = [16, 64, 256, 1024]
    rms: list[float] = []
    for m in sizes:
        errors = estimates(law, KERNELS["exp"], m, draws=150, heads=8, seed=m) - math.exp(T)
        rms.append(float(errors.square().mean().sqrt()))
    logs_m, logs_e = (torch.tensor([math.log(x) for x in values], dtype=torch.float64) for values in (sizes, rms))
    centred = logs_m - logs_m.mean()
    slope = float((centred * logs_e).sum() / centred.square().sum())
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_published_has_one_exact_constant():
    generator = torch.Generator().manual_seed(0)
    for m in (2, 3, 64):
        degrees = DEGREE_LAWS["published"].draw(m, generator)
        assert len(degrees) == m
        assert degrees.count(0) == 1
        assert all(0 <= n <= 20 for n in degrees)
    kernel = Kernel("three", lambda n: 3.0 / math.factorial(n))
    maclaurin = DEGREE_LAWS["published"].features(kernel, degrees)
    assert maclaurin.degrees[-1] == 0
    assert maclaurin.weights[-1] == math.sqrt(3.0)


@pytest.mark.parametrize("law", LAWS)
def test_degrees_follow_their_law(law):
    drawn = 40_000
    degrees = torch.tensor(DEGREE_LAWS[law].draw(drawn, torch.Generator().manual_seed(3)))
    bins = range(1, 9) if law == "published" else range(9)
    chi2, rest, rest_expected = 0.0, float((degrees > 8).sum()), float(drawn)
    for n in bins:
        expected = DEGREE_LAWS[law].expected(n, drawn)
        chi2 += (float((degrees == n).sum()) - expected) ** 2 / expected
        rest_expected -= expected
    rest_expected -= 1.0 if law == "published" else 0.0
    chi2 += (rest - rest_expected) ** 2 / rest_expected
    freedom = len(bins)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)
    assert DEGREE_LAWS[law].expected(1, 100) == pytest.approx(49.5 if law == "published" else 25.0, rel=1e-5)


def maps_of(mechanism: FeatureMechanism, scale: float) -> Maps:
    found = mechanism.features(scale).fast
    assert found is not None
    return found


def elu(x: Tensor) -> Tensor:
    return spec.features(Spec("elu"), Side(), x)


def explicit(maclaurin: RandomMaclaurin, directions: Tensor, x: Tensor, scale: float) -> Tensor:
    """phi_i(x) = weight_i prod_r <w_ir, sqrt(scale) x>, feature by feature and head by head."""
    batch, heads, length, _ = x.shape
    group = heads // len(directions)
    out = torch.empty(batch, heads, length, len(maclaurin.degrees), dtype=x.dtype)
    for h in range(heads):
        for i, (degree, weight) in enumerate(zip(maclaurin.degrees, maclaurin.weights, strict=True)):
            value = torch.full((batch, length), weight, dtype=x.dtype)
            for rank in range(degree):
                column = sum(d > r for r in range(rank) for d in maclaurin.degrees) + i
                value = value * (x[:, h] @ directions[h // group, :, column]) * math.sqrt(scale)
            out[:, h, :, i] = value
    return out


@pytest.mark.parametrize("degrees", [(5, 3, 3, 1, 1, 0), (0, 0, 0), (2, 2), (1, 0)])
@pytest.mark.parametrize("grad", [True, False])
def test_maclaurin_features_are_the_products_of_their_directions(degrees, grad):
    generator = torch.Generator().manual_seed(4)
    maclaurin = RandomMaclaurin(degrees, tuple(0.5 + i for i in range(len(degrees))))
    directions = rademacher((2, 6, maclaurin.num_directions), generator).double()
    x = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64, requires_grad=grad)
    kept = x.detach().clone()
    got = maclaurin_maps(maclaurin, directions, 0.7).of_queries(x)
    torch.testing.assert_close(got, explicit(maclaurin, directions, kept, 0.7), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)


def test_a_law_sorts_what_it_drew():
    maclaurin = DEGREE_LAWS["kar_karnick"].features(KERNELS["exp"], [0, 2, 1, 4])
    assert maclaurin.degrees == (4, 2, 1, 0)
    wanted = [math.sqrt(1 / math.factorial(n) / (4 * 2.0 ** -(n + 1))) for n in maclaurin.degrees]
    assert maclaurin.weights == pytest.approx(wanted, rel=1e-12)


def test_rademacher_signs_are_fair_and_independent():
    signs = rademacher((20_000, 3), torch.Generator().manual_seed(5))
    assert signs.dtype == torch.float32
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    for values in (*signs.T, signs[:, 0] * signs[:, 1], signs.prod(-1)):
        assert within(values, 0.0)


@pytest.mark.parametrize("name", KERNELS)
def test_taylor_features_are_constant_and_linear_term(name):
    kernel = KERNELS[name]
    phi_x, phi_y = first_order_maps(kernel, 1.0, 1, 6).of_queries(torch.stack([X, Y])[None, None])[0, 0]
    assert phi_x.shape == (7,)
    assert float(phi_x @ phi_y) == pytest.approx(kernel.coefficient(0) + kernel.coefficient(1) * T, rel=1e-12)


def test_elu_features_keep_their_digits_far_below_zero():
    x = torch.tensor([-80.0, -30.0, -17.0, -1.0, -0.0, 0.0, 0.5, 30.0])
    wanted = torch.where(x > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(elu(x).double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(elu(x), torch.nn.functional.elu(x) + 1, rtol=0, atol=1e-6)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(elu(x).sum(), x)
    torch.testing.assert_close(slope, x.detach().clamp(max=0).exp(), rtol=1e-6, atol=0)


def test_fourier_features_are_unbiased():
    rfa = Rfa(6, 20_000, num_features=8, generator=torch.Generator().manual_seed(6))
    phi = maps_of(rfa, 1.3).of_queries(torch.stack([X, Y]).expand(1, 20_000, 2, 6))[0]
    assert phi.shape == (20_000, 2, 8)
    apart = (X / X.norm() - Y / Y.norm()).square().sum()
    assert within((phi[:, 0] * phi[:, 1]).sum(-1), math.exp(-0.65 * float(apart)))
    torch.testing.assert_close(phi.square().sum(-1), torch.ones(20_000, 2, dtype=torch.float64))  # sin^2 + cos^2


@pytest.mark.parametrize("orthogonal", [True, False])
def test_positive_features_are_unbiased(orthogonal):
    generator = torch.Generator().manual_seed(7)
    heads, m = 6000, 9  # a block and a half of orthogonal directions
    favor = Favor(6, heads, num_features=m, generator=generator)
    if not orthogonal:
        favor.directions.normal_(generator=generator)
    phi = maps_of(favor, 2.25).of_queries(torch.stack([X, Y]).expand(1, heads, 2, 6))[0].exp()
    assert within((phi[:, 0] * phi[:, 1]).sum(-1), math.exp(2.25 * T))


def test_orthogonal_directions_are_orthogonal_in_blocks_with_chi_lengths():
    heads, d, m = 800, 5, 12
    directions = features.orthogonal_directions(heads, d, m, torch.Generator().manual_seed(8)).double()
    assert directions.shape == (heads, d, m)
    lengths = directions.norm(dim=1)
    cosines = (directions.mT @ directions) / (lengths[:, :, None] * lengths[:, None])
    block = torch.arange(m) // d
    same = (block[:, None] == block[None]) & ~torch.eye(m, dtype=torch.bool)
    assert float(cosines[:, same].abs().max()) < 1e-5
    # chi with d degrees of freedom: E r^2 = d, Var r^2 = 2 d, and independent of the others
    squares = lengths.square()
    assert within(squares.flatten(), d)
    assert within((squares - d).square().flatten(), 2 * d)
    assert within((squares[:, 0] - d) * (squares[:, 1] - d), 0.0)
    # every column is isotropic: E w w^T = 1
    for column in (0, 3, 10):
        w = directions[:, :, column]
        for i in range(d):
            assert within(w[:, i] ** 2, 1.0)
            assert within(w[:, i] * w[:, (i + 1) % d], 0.0)
    # across blocks the directions are independent: E cos^2 = 1 / d
    assert within(cosines[:, 0, 7].square(), 1 / d)


def test_a_draw_is_what_its_generator_says():
    one, two, three = (
        features.orthogonal_directions(2, 4, 6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
