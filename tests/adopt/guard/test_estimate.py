"""The estimate, its interval and the decision, by simulation beside errors that are known."""

import math
from statistics import fmean

import pytest
import torch
from torch import Tensor

from maclin.adopt.guard.estimate import MARGIN, Estimate, decision, estimates, row_sums, share_that_escapes
from maclin.adopt.guard.rows import sample_rows

HEADS, TOKENS, DRAWS = 9, 4096, 2000


def population(spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Squared errors and sizes (H, N): log-normal rows, heads and positions that differ, true relative error 1."""
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(HEADS, 1, generator=g).exp()
    along = torch.linspace(0.3, 3.0, TOKENS)
    error = head * along * (spread * torch.randn(HEADS, TOKENS, generator=g)).exp()
    size = (0.5 * torch.randn(HEADS, TOKENS, generator=g)).exp()
    return error / error.sum() * size.sum(), size


def drawn(error: Tensor, size: Tensor, rows: int, draws: int = DRAWS, confidence: float = 0.99) -> list[Estimate]:
    g = torch.Generator().manual_seed(1)
    chosen = sample_rows(draws, HEADS, error.shape[-1], rows, None, g, torch.device("cpu"))
    found = [x.expand(draws, -1, -1).gather(2, chosen.positions) for x in (error, size)]
    sums = row_sums(found[0], found[1], chosen.taken, chosen.tokens)
    return estimates(sums, chosen.taken.sum(-1).tolist(), HEADS, confidence)


@pytest.mark.parametrize(("spread", "covered"), [(0.5, 0.98), (1.0, 0.965), (1.5, 0.94), (2.0, 0.895)])
def test_intervals_hold_the_true_error(spread: float, covered: float) -> None:
    """A bound from above needs the rare large rows, and the more skewed they are the more often it is too low."""
    found = drawn(*population(spread), rows=32)
    assert fmean(one.high >= 1 for one in found) > covered
    assert fmean(one.low <= 1 for one in found) > 0.985


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5, 2.0])
def test_twice_the_tolerance_is_told_from_half_of_it(spread: float) -> None:
    """The true error is exactly twice the tolerance, then half of it: the hardest that must be told apart."""
    error, size = population(spread)
    first, more = drawn(error, size, rows=32), drawn(error, size, rows=128)
    for tolerance, wanted in ((1 / MARGIN, True), (MARGIN, False)):
        last = [b if decision(a, tolerance) == "open" else a for a, b in zip(first, more, strict=True)]
        flagged = fmean(decision(one, tolerance) != "within" for one in last)
        assert flagged >= 0.99 if wanted else flagged <= 0.01


def test_the_stated_deviation_is_the_one_between_draws() -> None:
    found = drawn(*population(1.0), rows=32)
    logs = torch.tensor([math.log(one.rel_error) for one in found])
    width = torch.tensor([math.log(one.rel_error / one.low) for one in found]) / 2.37  # student, 72 degrees
    assert float(width.square().mean().sqrt() / logs.std()) == pytest.approx(1.0, abs=0.15)
    assert abs(float(logs.mean())) < 0.02


def test_strata_are_worth_something() -> None:
    """Errors that grow along the text and differ by head: the spread between draws is far below that of free rows."""
    error = torch.linspace(0.0, 2.0, TOKENS) * torch.linspace(0.1, 2.0, HEADS)[:, None]
    found = drawn(error, torch.ones_like(error), rows=8, draws=500)
    logs = torch.tensor([math.log(one.rel_error) for one in found])
    free = float(error.std() / error.mean()) / math.sqrt(8 * HEADS) / 2
    assert float(logs.std()) < 0.3 * free


def test_few_rows_with_all_of_the_error_escape_as_often_as_stated() -> None:
    """Below the share that is stated nothing is promised; at it, 1 % of the draws see nothing."""
    share = share_that_escapes(32 * HEADS, 0.99)
    assert share == pytest.approx(1 - 0.01 ** (1 / 288))
    error = torch.zeros(HEADS, TOKENS)
    g = torch.Generator().manual_seed(3)
    bad = torch.rand(HEADS, TOKENS, generator=g) < share
    error[bad] = 1.0
    missed = fmean(one.rel_error == 0 for one in drawn(error, torch.ones_like(error), rows=32, draws=8000))
    assert missed == pytest.approx(0.01, abs=0.006)


def test_all_rows_leave_nothing_open() -> None:
    error, size = (x[:, :30] for x in population(2.0))
    (one,) = drawn(error, size, rows=32, draws=1)
    true = float((error.sum() / size.sum()).sqrt())
    assert (one.low, one.high) == (one.rel_error, one.rel_error)
    assert one.rel_error == pytest.approx(true, rel=1e-6)
    assert one.num_rows == 30 * HEADS


def test_shorter_sequences_of_a_batch_count_their_own_rows() -> None:
    error, size = torch.rand(2, 3, 6), torch.rand(2, 3, 6)
    taken = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    found = estimates(row_sums(error, size, taken, torch.tensor([6, 2])), [6, 2], 3, 0.99)
    for i, count in enumerate((6, 2)):
        true = float((error[i, :, :count].sum() / size[i, :, :count].sum()).sqrt())
        assert found[i].rel_error == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize(
    ("error", "size", "wanted"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, math.inf), (math.nan, 1.0, math.nan), (math.inf, 1.0, math.inf), (0.0, 1.0, 0.0)],
)
def test_nothing_to_divide_by(error: float, size: float, wanted: float) -> None:
    taken, tokens = torch.ones(1, 4, dtype=torch.bool), torch.tensor([40])
    rows = row_sums(torch.full((1, 2, 4), error), torch.full((1, 2, 4), size), taken, tokens)
    (one,) = estimates(rows, [4], 2, 0.99)
    assert one.rel_error == pytest.approx(wanted, nan_ok=True)
    assert one.finite == (not math.isnan(wanted))
    assert (decision(one, 0.5) == "within") == (wanted == 0)


@pytest.mark.parametrize(
    ("rel_error", "width", "wanted"),
    [(0.05, 1.1, "within"), (0.15, 1.1, "above"), (0.09, 3.0, "open"), (0.11, 3.0, "open"), (0.3, 3.0, "above")],
)
def test_decisions(rel_error: float, width: float, wanted: str) -> None:
    assert decision(Estimate(rel_error, rel_error / width, rel_error * width, 99), 0.1) == wanted
