"""How an unbiased estimator spends its features: counts per degree, and a law for the degrees that are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from .kernels import Kernel

_MAX_DEGREE = 60  # of the tail; beyond, a_n t^n is below 1e-15 of f for every kernel inside its variance radius
_MOST_COUNTED = 8  # degrees with a count of their own; those above share the features of the tail


def draw_degrees(law: Mapping[int, float], number: int, generator: torch.Generator | None) -> list[int]:
    """Degrees of so many features, in any order; none where the law is empty."""
    degrees = list(law)
    if not degrees or number == 0:
        return []
    p = torch.tensor([law[n] for n in degrees], dtype=torch.float64)
    return [degrees[int(i)] for i in torch.multinomial(p, number, replacement=True, generator=generator)]


def tail_law(kernel: Kernel, first: int, growth: float, also: Sequence[int] = ()) -> dict[int, float]:
    """P(n) proportional to a_n growth^(n/2) for n >= first and n in ``also``: of least variance where mu = growth.

    Empty for a polynomial of a lower degree.
    """
    degrees = (*also, *range(first, _MAX_DEGREE + 1))
    weights = {n: kernel.coefficient(n) * growth ** (n / 2) for n in degrees}
    total = sum(weights.values())
    return {n: w / total for n, w in weights.items() if w > 0} if total > 0 else {}


def counts_of(kernel: Kernel, head_dim: int, num_features: int, deviation: Callable[[int], float]) -> tuple[int, ...]:
    """Features per degree, so that the squared error sum_n a_n^2 V_n / M_n is least.

    Degrees 0 and 1 are exact; so is degree 2 where its D (D + 1) / 2 monomials fit and leave less error than
    drawing it. Each feature in turn goes where it saves most; what is left over for the tail, num_features minus
    the sum, is at least one.

    Args:
        kernel: f.
        head_dim: D.
        num_features: M, at least D + 2.
        deviation: degree -> sqrt(V_n), standard deviation of one feature of the degree.
    """
    exact = (1, head_dim)
    least, found = _spend(kernel, 2, num_features - sum(exact), deviation)
    of_second = head_dim * (head_dim + 1) // 2
    left = num_features - sum(exact) - of_second
    if left > 0 and kernel.coefficient(2) > 0:
        error, rest = _spend(kernel, 3, left, deviation)
        if error < least:
            return (*exact, of_second, *rest)
    return (*exact, *found)


def _spend(
    kernel: Kernel, first: int, features: int, deviation: Callable[[int], float]
) -> tuple[float, tuple[int, ...]]:
    """The squared error and the counts of degrees ``first`` and on, with at least one feature left for the tail."""
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for beyond in range(first, min(first + features, _MOST_COUNTED + 1)):
        degrees = range(first, beyond)
        tail = sum(kernel.coefficient(n) * deviation(n) for n in range(beyond, _MAX_DEGREE + 1))
        costs = [*(kernel.coefficient(n) * deviation(n) for n in degrees), tail]
        counts = _greedy(costs, features)
        error = sum(c * c / m for c, m in zip(costs, counts, strict=True) if c > 0)
        if error < best[0] * (1 - 1e-9):
            best = (error, tuple(counts[:-1]))
    return best


def _greedy(costs: Sequence[float], features: int) -> list[int]:
    """Counts that sum to ``features``, least sum of cost^2 / count; 0 for what costs nothing, but for the last."""
    counts = [1 if cost > 0 or i == len(costs) - 1 else 0 for i, cost in enumerate(costs)]
    for _ in range(features - sum(counts)):
        gains = [c * c / (m * (m + 1)) if m else 0.0 for c, m in zip(costs, counts, strict=True)]
        counts[max(range(len(gains)), key=gains.__getitem__)] += 1
    return counts
