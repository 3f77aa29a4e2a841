"""The number of features for a tolerance: every document judged without itself, and the smallest that will do."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from maclin.core import design
from maclin.core.confidence import bounded
from maclin.core.kernels import KERNELS
from maclin.core.selection import Selection, first_of, grid_of

EXP = KERNELS["exp"]


def docs_of(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> list[list[design.Document]]:
    root = q.shape[-1] ** -0.25
    return [design.documents(root * q, root * k, v, None, causal, head) for head in range(k.shape[1])]


def selection(docs: list[list[design.Document]], most: int = 128, floor: float = 0.7) -> Selection:
    return Selection(docs, EXP, most, floor, 0.975)


@pytest.mark.parametrize("causal", [False, True])
def test_every_document_is_judged_by_what_the_others_chose(problem, causal):
    docs = docs_of(*problem("aligned", 2.0, heads=2, kv_heads=2, batch=4, n=30), causal=causal)
    counts = (1, 8, 4, 3)
    found = selection(docs)._with(counts)
    squares, totals = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for head, highest, error in zip(docs, found.highest, found.rel_errors, strict=True):
        basis = design.basis_of(head, True)
        seen = design.candidates(basis.spread, [3 * 128 >> n - 2 for n in range(2, design.MAX_DEGREE + 1)])
        its = torch.zeros(2, dtype=torch.float64)
        for i, doc in enumerate(head):
            others = [other for j, other in enumerate(head) if j != i]
            axes = [a[:count] for a, count in zip(design.appraise(others, basis, EXP, seen).axes, counts, strict=False)]
            square, total = design.truncation([doc], basis, EXP, axes, 0.7)
            squares[i] += square[highest + 1]
            totals[i] += total
            its += torch.tensor([float(square[highest + 1]), total])
        assert error == pytest.approx(math.sqrt(float(its[0] / its[1])), rel=1e-6)
    assert (found.rel_error, found.bound) == pytest.approx(bounded(squares, totals, 0.975), rel=1e-6)


def test_no_document_may_choose_for_itself(problem):
    """One document has logits along an axis that no other one has: by its own choice it would be far better off."""
    q, k, v = problem("aligned", 1.0, batch=5, n=40)
    q[4], k[4] = 1.5 * q[4].flip(-1), 1.5 * k[4].flip(-1)
    docs = docs_of(q, k, v)
    made = selection(docs)
    found = made._with((1, 8, 3))

    def error(axes: tuple[Tensor, ...]) -> float:
        square, total = design.truncation(docs[0][4:], made.bases[0], EXP, axes, 0.7)
        return float(square[-1]) / total

    ranked = made._ranked[0]
    assert error(found.axes[0]) < 0.8 * error(ranked.without(4, (1, 8, 3)))
    own = sum(float(design.truncation([d], made.bases[0], EXP, found.axes[0], 0.7)[0][-1]) for d in docs[0])
    total = sum(float(design.truncation([d], made.bases[0], EXP, found.axes[0], 0.7)[1]) for d in docs[0])
    assert found.highest == (2,)
    assert found.rel_error is not None
    assert found.rel_error > 1.05 * math.sqrt(own / total)


def test_one_document_judges_itself(problem):
    (docs,) = docs_of(*problem("aligned", 1.0, batch=1, n=60))
    made = selection([docs])
    found = made._with((1, 8, 6))
    own, total = design.truncation(docs, made.bases[0], EXP, found.axes[0], 0.7)
    assert found.rel_error is not None
    assert found.rel_error == pytest.approx(math.sqrt(float(own[found.highest[0] + 1]) / total))
    assert found.bound == pytest.approx(1.25 * found.rel_error)


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03, 0.01])
def test_the_smallest_that_will_do(problem, tolerance):
    made = selection(docs_of(*problem("aligned", 1.5, batch=12, n=64)))
    found = made.within(tolerance, 9)
    number = sum(found.strata.counts)
    assert found.strata.bound is not None
    assert found.strata.bound <= tolerance
    assert found.least is not None
    assert 9 <= found.least <= number
    grid = grid_of(9, 128)
    for used, what in ((number, "bound"), (found.least, "rel_error")):
        if used > 9:
            below = made._of(max(n for n in grid if n < used)) if max(n for n in grid if n < used) > 9 else made.first
            assert getattr(below, what) > tolerance
    assert found.least == 9 or made._of(found.least).rel_error <= tolerance  # pyright: ignore[reportOptionalOperand]


def test_what_no_number_reaches(problem):
    made = selection(docs_of(*problem("isotropic", 8.0)), most=40)
    found = made.within(0.01, 9)
    assert found.least is None
    assert sum(found.strata.counts) == 40
    assert found.strata.bound is not None
    assert found.strata.bound > 0.01


def test_degrees_0_and_1_are_tried_before_anything_is_appraised(problem, monkeypatch):
    made = selection(docs_of(*problem("aligned", 0.2)))

    def refuse(*_: object) -> None:
        raise AssertionError("appraised")

    monkeypatch.setattr("maclin.core.selection.worths", refuse)
    found = made.within(0.3, 9)
    assert (sum(found.strata.counts), found.least) == (9, 9)


def test_bisection_finds_the_first_that_is_good():
    asked: list[int] = []

    def good(number: int) -> bool:
        asked.append(number)
        return number >= 100

    grid = grid_of(5, 1000)
    assert (grid[0], grid[-1]) == (5, 1000)
    assert all(0 < b - a <= max(1, 0.05 * a + 0.5) for a, b in pairwise(grid))
    assert first_of(grid, good) == min(n for n in grid if n >= 100)
    assert len(asked) < 12
    asked.clear()
    assert first_of(grid, lambda number: bool(asked.append(number))) == 1000
    assert asked == [5, 1000]  # where the largest will not do, no other is tried
    assert first_of(grid, lambda number: True) == 5
