"""The number of features that keeps a tolerance, and how sure the data can be of it.

Every document is judged once, by monomials that were ranked without it: what each monomial is worth is a sum over
documents, so leaving one out is a subtraction. Bases and counts per degree are those of all documents; they have far
fewer numbers than there are tokens to fit them to. A third of the documents held back would say the same with a third
of the evidence, and it is the evidence that the number depends on: documents differ by half their mean squared error
and more, while the error falls with a fourth root of the number of features, or slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .confidence import bounded
from .design import (
    MAX_DEGREE,
    Basis,
    Document,
    Monomials,
    allocate,
    basis_of,
    candidates,
    truncation,
    worths,
)
from .kernels import Kernel
from .stratified import Strata

STEP = 1.05
"""From one number of features that is tried to the next."""

_SEEN = 3  # candidates of degree 2 per feature of the budget; of each degree above, half as many
_LOW_DEGREE = 4  # tried beside MAX_DEGREE: beyond it the features of a sharp head serve a few rows only


@dataclass(frozen=True)
class Selected:
    """What was found for a tolerance.

    Args:
        strata: the smallest whose bound is within the tolerance; the largest where none is.
        least: the number of features from which on the error of these documents alone is within the tolerance,
            without the margin of the bound; None where no number is.
    """

    strata: Strata
    least: int | None


class Selection:
    """One layer's documents, each judged by what the others chose.

    Args:
        docs: per key head.
        kernel: f.
        most: the largest number of features that will be asked for.
        floor: of the denominators; see ``core.contract``.
        confidence: with which the bound is to hold on as many other documents.
    """

    def __init__(
        self, docs: Sequence[Sequence[Document]], kernel: Kernel, most: int, floor: float, confidence: float
    ) -> None:
        self.docs = docs
        self.kernel = kernel
        self.most = most
        self.floor = floor
        self.confidence = confidence
        self.bases = [basis_of(head, kernel.is_exponential) for head in docs]
        linear = [candidates(basis.spread, ()) for basis in self.bases]
        self.first = self._judged([[axes] * len(head) for axes, head in zip(linear, docs, strict=True)], linear)

    def within(self, tolerance: float, least: int) -> Selected:
        """The smallest number of features that keeps the tolerance, on a grid of steps of a twentieth."""
        made = {least: self.first}

        def at(number: int) -> Strata:
            if number not in made:
                made[number] = self._of(number)
            return made[number]

        grid = grid_of(least, self.most)
        found = at(first_of(grid, lambda number: _within(at(number).bound, tolerance)))
        # the error of the documents themselves is below its bound, so what keeps it is no larger
        below = [number for number in grid if number <= sum(found.counts)] or grid[:1]
        enough = first_of(below, lambda number: _within(at(number).rel_error, tolerance))
        its = at(enough)
        return Selected(found, sum(its.counts) if _within(its.rel_error, tolerance) else None)

    @cached_property
    def _ranked(self) -> list[_Ranked]:
        """The candidates of each head, appraised; what takes the time, so only where degree 1 is not enough."""
        seen = [max(_SEEN * self.most >> n - 2, 1) for n in range(2, MAX_DEGREE + 1)]
        return [
            _Ranked.of(head, basis, self.kernel, candidates(basis.spread, seen))
            for head, basis in zip(self.docs, self.bases, strict=True)
        ]

    def _of(self, number: int) -> Strata:
        """The best strata of this size: low degrees where logits are sharp, higher ones where the series converges."""
        whole = [ranked.whole for ranked in self._ranked]
        choices = {allocate(whole, self.first.rel_errors, number, highest) for highest in (MAX_DEGREE, _LOW_DEGREE)}
        return min((self._with(counts) for counts in choices), key=_mean_error)

    def _with(self, counts: Sequence[int]) -> Strata:
        return self._judged(
            [[ranked.without(i, counts) for i in range(ranked.number)] for ranked in self._ranked],
            [_cut(ranked.whole.axes, counts) for ranked in self._ranked],
        )

    def _judged(self, by_document: Sequence[Sequence[_Axes]], axes: Sequence[_Axes]) -> Strata:
        """Strata of these axes, with the error of each document by the axes that were chosen without it."""
        highest: list[int] = []
        errors: list[float] = []
        squares, totals = (torch.zeros(len(self.docs[0]), dtype=torch.float64) for _ in range(2))
        for head, basis, chosen in zip(self.docs, self.bases, by_document, strict=True):
            each = [
                truncation([doc], basis, self.kernel, its, self.floor) for doc, its in zip(head, chosen, strict=True)
            ]
            square = torch.stack([found for found, _ in each]).nan_to_num(torch.inf, torch.inf, torch.inf)
            total = torch.tensor([of_out for _, of_out in each], dtype=torch.float64)
            best = int(square.sum(0).argmin())
            highest.append(best - 1)
            errors.append(math.sqrt(float(square[:, best].sum() / total.sum().clamp_min(1e-300))))
            squares, totals = squares + square[:, best], totals + total
        rel_error, bound = bounded(squares, totals, self.confidence)
        counts = tuple(len(chosen) for chosen in axes[0])
        return Strata(counts, tuple(axes), tuple(highest), tuple(self.bases), tuple(errors), rel_error, bound)


_Axes = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Ranked:
    """Candidates of one head: in order of their worth to all documents, and what each is worth to which.

    Args:
        axes: per degree (count, n), in the order of ``worth``.
        worth: per degree (documents, count).
        whole: the same in order, worths summed.
    """

    axes: _Axes
    worth: tuple[Tensor, ...]
    whole: Monomials

    @classmethod
    def of(cls, docs: Sequence[Document], basis: Basis, kernel: Kernel, axes: _Axes) -> _Ranked:
        worth, totals = worths(docs, basis, kernel, axes)
        return cls(axes, tuple(worth), Monomials.ordered(axes, [w.sum(0) for w in worth], float(totals.sum())))

    @property
    def number(self) -> int:
        """Of documents."""
        return len(self.worth[0])

    def without(self, document: int, counts: Sequence[int]) -> _Axes:
        """The best monomials in these numbers for all documents but one; with one alone, for it."""
        if self.number == 1:
            return _cut(self.whole.axes, counts)
        return tuple(
            axes[(worth.sum(0) - worth[document]).topk(count).indices]
            for axes, worth, count in zip(self.axes, self.worth, counts, strict=False)
        )


def first_of(grid: Sequence[int], good: Callable[[int], bool]) -> int:
    """The first number of a grid that is good, by bisection: those above are taken for good; the last if none is."""
    if good(grid[0]):  # costs least
        return grid[0]
    if not good(grid[-1]):
        return grid[-1]
    low, high = 1, len(grid) - 1
    while low < high:
        middle = (low + high) // 2
        if good(grid[middle]):
            high = middle
        else:
            low = middle + 1
    return grid[low]


def grid_of(least: int, most: int) -> list[int]:
    """Numbers from ``least`` to ``most`` in steps of a twentieth, at least of 1."""
    grid = [least]
    while grid[-1] < most:
        grid.append(min(max(grid[-1] + 1, round(grid[-1] * STEP)), most))
    return grid


def _within(error: float | None, tolerance: float) -> bool:
    return error is not None and error <= tolerance


def _cut(axes: _Axes, counts: Sequence[int]) -> _Axes:
    return tuple(chosen[:count] for chosen, count in zip(axes, counts, strict=False))


def _mean_error(strata: Strata) -> float:
    """Geometric mean over the heads, so that a head that nothing helps has no say."""
    logs = [math.log(max(error, 1e-12)) for error in strata.rel_errors]
    return math.exp(sum(logs) / len(logs))
