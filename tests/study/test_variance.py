"""Closed forms against full enumeration, quadrature and the features of ``core``."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from maclin.core.features import DEGREE_LAWS, rademacher
from maclin.core.kernels import KERNELS, Kernel
from maclin.core.maps import maclaurin_maps
from maclin.study.theory import variance as theory
from maclin.study.theory.draws import hadamard
from maclin.study.theory.variance import Pair

X = torch.tensor([0.7, -0.4, 0.5, 0.2], dtype=torch.float64)
Y = torch.tensor([0.6, 0.3, 0.4, -0.1], dtype=torch.float64)
PAIR = Pair.of(X, Y)
SIGNS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)


def one_rank(sketch: str, num_features: int) -> Tensor:
    """Every value, equally likely, of z = <w, x> conj(<w, y>) of the features of one rank. Shape: (outcomes, M)."""
    if sketch == "rademacher":
        z = (SIGNS @ X) * (SIGNS @ Y)
        return torch.cartesian_prod(*[z] * num_features).reshape(-1, num_features)
    if sketch == "complex":
        w = torch.tensor(list(itertools.product([1, 1j, -1, -1j], repeat=4)), dtype=torch.complex128)
        return ((w @ X.to(w.dtype)) * (w @ Y.to(w.dtype)).conj())[:, None]
    rows = torch.tensor(list(itertools.permutations(range(4), num_features)))
    spread = [((hadamard(4) * signs) @ X) * ((hadamard(4) * signs) @ Y) for signs in SIGNS]
    return torch.cat([z[rows] for z in spread])


def enumerated(sketch: str, degree: int, num_features: int) -> Tensor:
    """Every value, equally likely, of the estimate of <x, y>^degree."""
    rank = one_rank(sketch, num_features)
    product = rank
    for _ in range(degree - 1):
        product = (product[:, None] * rank[None]).flatten(0, 1)
    return product.mean(-1).real


@pytest.mark.parametrize(
    ("sketch", "degree", "num_features"),
    [
        ("rademacher", 1, 1),
        ("rademacher", 1, 2),
        ("rademacher", 2, 2),
        ("rademacher", 4, 1),
        ("complex", 1, 2),
        ("complex", 2, 2),
        ("srht", 1, 1),
        ("srht", 1, 3),
        ("srht", 1, 4),
        ("srht", 2, 2),
        ("srht", 2, 3),
        ("srht", 2, 4),
    ],
)
def test_closed_forms_are_what_enumeration_gives(sketch: str, degree: int, num_features: int) -> None:
    values = enumerated(sketch, degree, num_features)
    assert float(values.mean()) == pytest.approx(PAIR.dot**degree, rel=1e-10)
    variance = float(values.var(unbiased=False))
    assert theory.sketch_variance(sketch, PAIR, degree, num_features, 4) == pytest.approx(variance, rel=1e-9, abs=1e-15)


def test_srht_takes_blocks_of_d_rows() -> None:
    of_four, of_two = (float(enumerated("srht", 2, m).var(unbiased=False)) for m in (4, 2))
    expected = (4**2 * of_four + 2**2 * of_two) / 6**2  # blocks are independent, each counts by its features
    assert theory.sketch_variance("srht", PAIR, 2, 6, 4) == pytest.approx(expected, rel=1e-9)
    assert theory.sketch_variance("srht", PAIR, 1, 8, 4) == 0.0


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_gaussian_moments_are_what_quadrature_gives(degree: int) -> None:
    # three nodes integrate a polynomial of degree 5 against a normal weight exactly; (w x)^2 (w y)^2 has 4
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
    weights = torch.tensor([1, 4, 1], dtype=torch.float64) / 6
    w = torch.cartesian_prod(*[nodes] * 4)
    probability = torch.cartesian_prod(*[weights] * 4).prod(-1)
    second = float((probability * (w @ X) ** 2 * (w @ Y) ** 2).sum())
    expected = (second**degree - PAIR.dot ** (2 * degree)) / 5
    assert theory.sketch_variance("gaussian", PAIR, degree, 5, 4) == pytest.approx(expected, rel=1e-12)


def by_hand(law: str, kernel: Kernel, pair: Tensor, num_features: int, draws: int) -> Tensor:
    """Estimates of f(<x, y>), each from its own draw of ``core.features``."""
    generator = torch.Generator().manual_seed(2)
    out = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        features = DEGREE_LAWS[law].features(kernel, DEGREE_LAWS[law].draw(num_features, generator))
        directions = rademacher((1, pair.shape[-1], features.num_directions), generator).double()
        phi = maclaurin_maps(features, directions, 1.0).of_queries(pair[None, None])[0, 0]
        out[i] = phi[0] @ phi[1]
    return out


@pytest.mark.parametrize("law", theory.LAWS)
@pytest.mark.parametrize("name", ["exp", "log"])
def test_the_moments_of_a_kernel_are_those_of_its_features(law: str, name: str) -> None:
    kernel, pair = KERNELS[name], 0.7 * torch.stack([X, Y])
    variance, bias = theory.kernel_moments(law, kernel, Pair.of(*pair), 16)
    errors = by_hand(law, kernel, pair, 16, 2000) - theory.kernel_value(kernel, float(pair[0] @ pair[1]))
    assert float(errors.mean()) == pytest.approx(bias, abs=4 * math.sqrt(variance / 2000))
    spread = float((errors**2).std()) / math.sqrt(2000)
    assert abs(float((errors**2).mean()) - variance - bias**2) < 4 * spread
    assert spread < 0.15 * variance


def test_the_published_law_leaves_out_what_is_above_degree_20() -> None:
    pair = Pair(dot=0.9, norms=1.0, squares=0.1, l1=2.0)
    assert theory.kernel_moments("published", KERNELS["inv"], pair, 8)[1] == pytest.approx(-(0.9**21) / 0.1, rel=1e-9)
    assert theory.kernel_moments("kar_karnick", KERNELS["exp"], pair, 8)[1] == pytest.approx(0.0, abs=1e-14)


def test_a_variance_that_diverges_is_infinite() -> None:
    within, beyond = Pair.of(X, Y).scaled(0.3), Pair.of(X, Y)
    assert 2 * within.mu < 1 < 2 * beyond.mu
    assert math.isfinite(theory.kernel_moments("kar_karnick", KERNELS["inv"], within, 8)[0])
    assert theory.kernel_moments("kar_karnick", KERNELS["inv"], beyond, 8)[0] == math.inf


def test_no_law_of_degrees_is_better_than_the_best() -> None:
    # over degrees 1 to 30, the variance of one feature is sum a_n^2 mu^n / P(n) minus the squared mean
    a = torch.tensor([KERNELS["exp"].coefficient(n) for n in range(1, 31)], dtype=torch.float64)
    moments = a**2 * PAIR.mu ** torch.arange(1, 31, dtype=torch.float64)
    mean = math.exp(PAIR.dot) - 1

    def variance(law: Tensor) -> float:
        return float((moments / (law / law.sum())).sum()) - mean**2

    best = moments.sqrt()
    assert theory.best_variance(KERNELS["exp"], PAIR, 2) == pytest.approx(variance(best), rel=1e-9)
    for seed in range(5):
        noise = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert variance(best * (1 + noise)) > variance(best)
    for law in theory.LAWS:
        assert theory.kernel_moments(law, KERNELS["exp"], PAIR, 9)[0] > theory.best_variance(KERNELS["exp"], PAIR, 9)


@pytest.mark.parametrize("law", theory.LAWS)
def test_no_product_of_features_is_larger_than_the_bound_and_one_attains_it(law: str) -> None:
    kernel = Kernel("short", lambda n: (1.0, 2.0, 0.5)[n] if n < 3 else 0.0)
    x, y = X.abs(), Y.abs()
    degrees = range(3) if law == "kar_karnick" else range(1, 3)
    probability = {n: 2.0 ** -(n + 1) if law == "kar_karnick" else 2.0**-n / (1 - 2.0**-20) for n in degrees}
    z = (SIGNS @ x) * (SIGNS @ y)
    largest = max(kernel.coefficient(n) / probability[n] * float(z.abs().max()) ** n for n in degrees)
    bound = theory.feature_bound(law, kernel, Pair.of(x, y).l1)
    assert bound == pytest.approx(largest, rel=1e-12)
    if law == "kar_karnick":
        assert bound < theory.kar_karnick_bound(kernel, Pair.of(x, y).l1)


def test_bounds_are_infinite_where_terms_grow_for_ever() -> None:
    assert theory.feature_bound("kar_karnick", KERNELS["inv"], 0.6) == math.inf
    assert theory.kar_karnick_bound(KERNELS["inv"], 0.5) == math.inf
    assert theory.kar_karnick_bound(KERNELS["inv"], 0.25) == pytest.approx(2 / (1 - 0.5))


def test_hoeffding_holds_and_can_be_turned_around() -> None:
    kernel, pair = KERNELS["exp"], 0.3 * torch.stack([X, Y])
    bound = theory.feature_bound("kar_karnick", kernel, Pair.of(*pair).l1)
    errors = by_hand("kar_karnick", kernel, pair, 20, 500) - theory.kernel_value(kernel, float(pair[0] @ pair[1]))
    for failure in (0.5, 0.1, 0.01):
        promised = theory.hoeffding_error(bound, 20, failure)
        assert float((errors.abs() >= promised).double().mean()) <= failure
        assert theory.hoeffding_features(bound, promised, failure) == pytest.approx(20)
    m = theory.hoeffding_features(bound, 0.1)
    assert 2 * math.exp(-m * 0.1**2 / (2 * bound**2)) == pytest.approx(1.0)
