"""Unbiased stratified features: no bias for any kernel, and the best use of a budget."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from maclin.core import unbiased
from maclin.core.kernels import KERNELS, Kernel
from maclin.core.mechanisms.macformer import Macformer
from maclin.core.stratified_map import StratifiedMap

CUBIC = Kernel("cubic", lambda n: (1.0, 0.5, 2.0, 1.0)[n] if n < 4 else 0.0)
EVEN = Kernel("even", lambda n: 0.0 if n % 2 else 1 / math.factorial(n))
CASES: dict[str, tuple[Kernel, tuple[int, ...], int]] = {
    # kernel, counts, tail; 10 monomials of degree 2 are all there are
    **{name: (kernel, (1, 4, 3), 3) for name, kernel in KERNELS.items()},
    "tail only": (KERNELS["exp"], (1, 4), 4),
    "whole degree 2": (KERNELS["inv"], (1, 4, 10, 2), 2),
    "degrees without a count": (KERNELS["inv"], (1, 4, 0, 3, 0, 1), 3),
    "polynomial without a tail": (CUBIC, (1, 4, 2, 2), 3),
    "polynomial in the tail": (CUBIC, (1, 4, 2), 2),
    "even": (EVEN, (1, 4, 2, 0, 2), 2),
}


def pair() -> tuple[Tensor, Tensor]:
    """Unit vectors with <x, y> about 0.8."""
    x, y = torch.tensor([[0.9, -0.4, 0.6, 0.2], [0.5, -0.6, 0.8, -0.1]], dtype=torch.float64)
    return x / x.norm(), y / y.norm()


@pytest.mark.parametrize(
    ("case", "centred"),
    [*((case, False) for case in CASES), *((case, True) for case in CASES if CASES[case][0].is_exponential)],
)
def test_no_bias(case, centred):
    """120 draws of degrees, each with 60 draws of directions: the mean is f(t) within its standard error."""
    kernel, counts, tail = CASES[case]
    heads, scale = 60, 0.5
    features = StratifiedMap(
        kernel, 4, heads, counts, tail, 0.3, centred, generator=torch.Generator().manual_seed(0)
    ).double()
    x, y = pair()
    wanted = float(kernel(scale * (x @ y)))
    if centred:
        generator = torch.Generator().manual_seed(1)
        for name in ("q_centre", "k_centre"):
            getattr(features, name).copy_(0.3 * torch.randn(heads, 4, generator=generator))
        turned = torch.linalg.qr(torch.randn(heads, 4, 4, generator=generator, dtype=torch.float64)).Q
        features.q_basis.copy_(2 * turned)
        features.k_basis.copy_(turned / 2)
    means = []
    generator = torch.Generator().manual_seed(2)
    for _ in range(120):
        features.resample_(generator)
        maps = features.maps(scale)
        got = (maps.of_queries(x.expand(1, heads, 1, 4)) * maps.of_keys(y.expand(1, heads, 1, 4))).sum(-1)[0, :, 0]
        if centred:  # a factor per query is left out
            got = got * (scale * (features.k_centre @ x)).exp()
        means.append(float(got.mean()))
    estimates = torch.tensor(means, dtype=torch.float64)
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert 1e-6 < error < 0.03 * wanted
    assert abs(float(estimates.mean()) - wanted) < 3.5 * error


@pytest.mark.parametrize("case", CASES)
def test_every_degree_is_exact_counted_or_in_the_tail(case):
    kernel, counts, tail = CASES[case]
    features = StratifiedMap(kernel, 4, 2, counts, tail, generator=torch.Generator().manual_seed(0))
    number, law = features.drawn_law()
    counted = features.drawn_counts()
    assert not set(law) & set(counted)
    for degree in range(30):
        if kernel.coefficient(degree) > 0:
            assert degree < features.num_exact or degree in counted or degree in law, degree
    assert sum(law.values()) == (pytest.approx(1.0) if law else 0)
    assert number == (tail if law else 0)
    assert not features.is_exact()
    assert StratifiedMap(kernel, 4, 2, counts).is_exact()


def test_what_is_drawn_anew_and_what_stays():
    mech = Macformer(6, 2, unbiased=True, num_features=60, kernel="inv")
    features = mech.map
    assert isinstance(features, StratifiedMap)
    before = {name: x.clone() for name, x in features.named_buffers()}
    counts, exact = features.counts, sum(features.counts[: features.num_exact])
    mech.resample_(torch.Generator().manual_seed(5))
    after = dict(features.named_buffers())
    assert mech.map is features
    assert features.counts == counts
    assert features.num_features == len(after["degrees"]) == 60
    assert not torch.equal(after["directions"], before["directions"])
    assert torch.equal(after["degrees"][-exact:], before["degrees"][-exact:])
    for degree in features.drawn_counts():
        assert int((after["degrees"] == degree).sum()) == counts[degree]


@pytest.mark.parametrize("first", [1, 2, 4])
def test_the_tail_has_the_law_of_least_variance(first):
    """Among all laws on these degrees, sum a_n^2 mu^n / P_n is least."""
    kernel, growth = KERNELS["log"], 0.3
    law = unbiased.tail_law(kernel, first, growth)
    assert min(law) == first
    assert sum(law.values()) == pytest.approx(1.0)

    def variance(p: dict[int, float]) -> float:
        return sum(kernel.coefficient(n) ** 2 * growth**n / p[n] for n in law)

    least = variance(law)
    for factor in (0.8, 1.25):
        for degree in (first, first + 1, first + 3):
            moved = law | {degree: law[degree] * factor}
            assert variance({n: p / sum(moved.values()) for n, p in moved.items()}) > least
    assert unbiased.tail_law(CUBIC, 4, growth) == {}
    assert set(unbiased.tail_law(CUBIC, 4, growth, (2,))) == {2}


def test_degrees_are_drawn_from_their_law():
    law = {2: 0.5, 3: 0.3, 7: 0.2}
    drawn = unbiased.draw_degrees(law, 20_000, torch.Generator().manual_seed(0))
    for degree, p in law.items():
        assert drawn.count(degree) / 20_000 == pytest.approx(p, abs=0.015)
    assert unbiased.draw_degrees({}, 5, None) == unbiased.draw_degrees(law, 0, None) == []


@pytest.mark.parametrize("costs", [[3.0, 1.0, 0.2], [1.0, 1.0, 1.0], [0.0, 2.0, 0.5], [5.0, 0.0, 0.0], [0.1, 0.1, 4.0]])
@pytest.mark.parametrize("features", [3, 4, 9, 17])
def test_one_by_one_is_as_good_as_all_at_once(costs, features):
    def error(counts: tuple[int, ...]) -> float:
        if any(c > 0 and m == 0 for c, m in zip(costs, counts, strict=True)):
            return math.inf
        return sum(c * c / m for c, m in zip(costs, counts, strict=True) if m)

    got = tuple(unbiased._greedy(costs, features))
    assert sum(got) == features
    assert all(m == 0 for c, m in zip(costs[:-1], got[:-1], strict=True) if c == 0)
    # the last, the tail, has one in any case
    possible = (c for c in itertools.product(range(features + 1), repeat=3) if sum(c) == features and c[-1])
    best = min(map(error, possible))
    assert error(got) == pytest.approx(best)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("growth", [0.05, 0.3, 3.0])
def test_the_counts_are_the_best_there_are(name, growth):
    """Against every number of features of degrees 2 and 3, with and without a whole degree 2."""
    kernel, width, budget = KERNELS[name], 3, 16
    if growth > 1 and math.isfinite(kernel.radius):
        growth = 0.6

    def deviation(n: int) -> float:
        return growth ** (n / 2)

    def error(counts: tuple[int, ...]) -> float:
        left = budget - sum(counts)
        beyond = sum(kernel.coefficient(n) * deviation(n) for n in range(len(counts), 61))
        whole = len(counts) > 2 and counts[2] == 6
        drawn = [
            (kernel.coefficient(n) * deviation(n)) ** 2 / m
            for n, m in enumerate(counts)
            if n > 1 and not (n == 2 and whole) and m
        ]
        return sum(drawn) + beyond**2 / left

    counts = unbiased.counts_of(kernel, width, budget, deviation)
    assert counts[:2] == (1, width)
    assert sum(counts) < budget
    possible = [(1, width)]
    possible += [(1, width, a) for a in range(1, 12)]
    possible += [(1, width, a, b) for a in range(1, 12) for b in range(1, 12 - a)]
    assert error(counts) <= min(map(error, possible)) * (1 + 1e-9)


def test_the_smallest_budget_is_one_random_feature():
    for name in KERNELS:
        features = Macformer(6, 2, unbiased=True, num_features=8, kernel=name).map
        assert isinstance(features, StratifiedMap)
        assert features.counts == (1, 6)
        assert features.tail == 1
