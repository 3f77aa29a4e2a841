"""How far other documents may be off: Student's quantiles against the printed tables, coverage by simulation."""

import math

import pytest
import torch

from maclin.core.confidence import bounded, student


@pytest.mark.parametrize(
    ("confidence", "quantiles"),
    [
        (0.5, {1: 0, 2: 0, 3: 0, 10: 0}),
        (0.9, {1: 3.078, 2: 1.886, 3: 1.638, 5: 1.476, 17: 1.333, 30: 1.310}),
        (0.95, {1: 6.314, 2: 2.920, 3: 2.353, 5: 2.015, 17: 1.740, 30: 1.697}),
        (0.975, {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 17: 2.110, 30: 2.042}),
        (0.99, {1: 31.821, 2: 6.965, 3: 4.541, 5: 3.365, 17: 2.567, 30: 2.457}),
    ],
)
def test_the_quantiles_are_those_of_the_tables(confidence, quantiles):
    for free, wanted in quantiles.items():
        assert student(confidence, free) == pytest.approx(wanted, rel=0.005, abs=1e-12)


@pytest.mark.parametrize("number", [3, 6, 20])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.975])
def test_as_many_other_documents_are_within_the_bound_as_often_as_was_asked(number, confidence):
    """Squared errors with a long tail, as documents have them: their spread is three quarters of their mean."""
    generator = torch.Generator().manual_seed(number)
    draws = 1500

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        totals = 5 + torch.rand(draws, number, generator=generator, dtype=torch.float64)
        errors = (0.67 * torch.randn(draws, number, generator=generator, dtype=torch.float64)).exp()
        return 0.03 * totals * errors, totals

    seen, others = sample(), sample()
    kept = 0
    for squares, totals, other_squares, other_totals in zip(*seen, *others, strict=True):
        error, bound = bounded(squares, totals, confidence)
        assert error == pytest.approx(math.sqrt(float(squares.sum() / totals.sum())))
        assert bound >= error
        kept += float(other_squares.sum() / other_totals.sum()) <= bound**2
    assert kept / draws > confidence - 0.045  # so long a tail costs a few in a hundred
    assert kept / draws < confidence + (0.03 if number > 3 else 0.06)


def test_the_bound_grows_with_the_confidence_and_shrinks_with_the_documents():
    squares = torch.tensor([0.02, 0.05, 0.03, 0.09, 0.04], dtype=torch.float64)
    totals = torch.ones(5, dtype=torch.float64)
    bounds = [bounded(squares, totals, c)[1] for c in (0.5, 0.7, 0.9, 0.975, 0.999)]
    assert bounds == sorted(set(bounds))
    assert bounds[0] == pytest.approx(bounded(squares, totals, 0.9)[0])
    error, more = bounded(squares.repeat(4), totals.repeat(4), 0.975)
    assert error == pytest.approx(bounds[0])
    assert math.log(more / error) < 0.5 * math.log(bounds[3] / error)


def test_documents_that_agree_by_chance_are_not_believed():
    squares = torch.full((3,), 0.04, dtype=torch.float64)
    error, bound = bounded(squares, torch.ones(3, dtype=torch.float64), 0.975)
    assert error == pytest.approx(0.2)
    assert bound > 1.3 * error


@pytest.mark.parametrize("number", [1, 4])
def test_what_has_no_spread(number):
    ones = torch.ones(number, dtype=torch.float64)
    assert bounded(0 * ones, ones, 0.975) == (0.0, 0.0)
    assert bounded(math.inf * ones, ones, 0.975) == (math.inf, math.inf)
    error, bound = bounded(0.01 * ones[:1], 4 * ones[:1], 0.975)
    assert error == pytest.approx(0.05)
    assert bound == pytest.approx(1.25 * error)  # one document says nothing of others
