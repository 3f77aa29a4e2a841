"""Which head of a layer gets what: for every number of heads of each mechanism the assignment of least error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from maclin.adopt.planning.knapsack import ROUNDING

MOST_PARTS = 3
"""Mechanisms in one layer, exact attention included."""


class Part(NamedTuple):
    """What a head may get.

    Args:
        fixed: cost of the mechanism on no head at all.
        each: cost of each unit of heads on top.
        errors: weighted squared error of each unit.
    """

    fixed: float
    each: float
    errors: tuple[float, ...]


class Assignment(NamedTuple):
    """The part of each unit of heads; what all of them cost, and their error."""

    cost: float
    error: float
    parts: tuple[int, ...]


def assignments(parts: Sequence[Part], apart: float = 0.0) -> list[Assignment]:
    """The assignments of two or ``MOST_PARTS`` parts to the units that no other of these beats, the cheapest first.

    A unit is the heads of one key head, which stay together. What so many units of each part cost does not depend on
    which they are, so for each set of parts and each number of units the least error is found, unit by unit.

    Args:
        parts: what there is; exact attention among them where heads may stay exact.
        apart: what taking heads apart and together costs.
    """
    units = len(parts[0].errors) if parts else 0
    kept = _unbeaten(parts)
    found = [
        counted
        for size in range(2, min(MOST_PARTS, units, len(kept)) + 1)
        for chosen in combinations(kept, size)
        for counted in _counted(parts, chosen, units, apart)
    ]
    found.sort(key=lambda counted: counted[:2])
    best: list[Assignment] = []
    for counted in found:
        if not best or counted.error < best[-1].error - ROUNDING:
            best.append(Assignment(counted.cost, counted.error, counted.traced()))
    return best


class _Counted(NamedTuple):
    """The assignment of least error for so many units of each chosen part."""

    cost: float
    error: float
    counts: tuple[int, ...]  # without the last, which gets the rest
    chosen: tuple[int, ...]
    taken: np.ndarray  # (units, *counts): which of the chosen the last of so many units got

    def traced(self) -> tuple[int, ...]:
        """The part of each unit."""
        found: list[int] = []
        left = list(self.counts)
        for unit in range(len(self.taken) - 1, -1, -1):
            number = int(self.taken[(unit, *left)])
            found.append(self.chosen[number])
            if number < len(left):
                left[number] -= 1
        return tuple(reversed(found))


def _unbeaten(parts: Sequence[Part]) -> list[int]:
    """Parts that no other beats on every unit, in what they cost and in what they miss."""

    def beats(a: Part, b: Part) -> bool:
        return (
            a.fixed <= b.fixed
            and a.each <= b.each
            and all(x <= y for x, y in zip(a.errors, b.errors, strict=True))
            and a != b
        )

    return [i for i, part in enumerate(parts) if not any(beats(other, part) for other in parts)]


def _counted(parts: Sequence[Part], chosen: tuple[int, ...], units: int, apart: float) -> Iterator[_Counted]:
    """For each number of units of each chosen part, none of them 0."""
    shape = (units + 1,) * (len(chosen) - 1)  # the last part gets what the others leave
    least = np.full(shape, np.inf)
    least[(0,) * len(shape)] = 0.0
    taken = np.zeros((units, *shape), dtype=np.int8)
    for unit in range(units):
        options: list[np.ndarray] = []
        for number, index in enumerate(chosen):
            option = least + parts[index].errors[unit]
            if number < len(shape):  # one unit more of this part
                option = np.roll(option, 1, axis=number)
                option[(slice(None),) * number + (0,)] = np.inf
            options.append(option)
        stacked = np.stack(options)
        taken[unit] = stacked.argmin(0)
        least = stacked.min(0)
    for counts in np.ndindex(shape):
        each = (*counts, units - sum(counts))
        if min(each) >= 1:
            pairs = zip(chosen, each, strict=True)
            cost = apart + sum(parts[index].fixed + parts[index].each * count for index, count in pairs)
            yield _Counted(cost, float(least[counts]), counts, chosen, taken)
