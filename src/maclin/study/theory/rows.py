"""Each simulated figure of the theory study beside its closed form, over all seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ...core.kernels import KERNELS, Kernel
from ...records import Config
from . import variance as theory
from .variance import Pair

QUANTILES = (0.5, 0.9, 0.99)
"""Shares of the draws whose error lies below the measured quantile."""
FAILURE = 0.01
"""What the bound and the quantile that are compared leave out."""
SEEN = 0.99
"""Least share of a variance that the simulation can be expected to show, for the two to be compared."""
CHANCE = 0.003
"""A simulated figure that is further from the closed form than chance alone makes it so often does not agree."""


@dataclass(frozen=True)
class Simulated:
    """Bias and mean-square error of an estimate, one figure of each for every seed, and what the closed form says."""

    bias: tuple[float, ...]
    square: tuple[float, ...]
    closed_bias: float
    closed_square: float  # infinite where there is none

    @property
    def ratio(self) -> float | None:
        """Simulated over closed mean-square error; None where the closed form is zero or infinite."""
        return fmean(self.square) / self.closed_square if 0 < self.closed_square < math.inf else None

    @property
    def ratio_error(self) -> float | None:
        """Standard error of the ratio."""
        return standard_error(self.square) / self.closed_square if 0 < self.closed_square < math.inf else None

    @property
    def bias_errors(self) -> float:
        """How many standard errors the bias is away from that of the closed form."""
        off = fmean(self.bias) - self.closed_bias
        error = standard_error(self.bias)
        return off / error if error > 0 else 0.0

    @property
    def agrees(self) -> bool:
        """Whether the mean-square error is as near to the closed form as chance allows."""
        ratio, error = self.ratio, self.ratio_error
        return ratio is not None and error is not None and self._by_chance(abs(ratio - 1) / error)

    @property
    def is_unbiased(self) -> bool:
        """Whether the mean error is as near to the closed form as chance allows."""
        return self._by_chance(abs(self.bias_errors))

    def _by_chance(self, errors: float) -> bool:
        return exceeded_by_chance(errors, len(self.bias) - 1) >= CHANCE


@dataclass(frozen=True)
class DegreeRow(Simulated):
    """<x, y>^n for unit vectors, by one sketch."""

    sketch: str
    num_features: int
    cosine: float
    degree: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left of the variance: rounding is all that the simulation shows."""
        return self.closed_square < 1e-12


@dataclass(frozen=True)
class KernelRow(Simulated):
    """A whole kernel f at one pair, by one law of degrees; errors are absolute, ``value`` is f(t)."""

    law: str
    kernel: str
    num_features: int
    radius: float
    cosine: float
    quantiles: tuple[float, ...]  # of the absolute error, as in theory.QUANTILES
    value: float
    seen: float  # share of the variance that the simulation can be expected to show
    best_square: float  # of the best law of degrees for this pair
    uniform: float  # error of f(0) for every pair
    taylor: float  # error of the constant and the linear term
    bound: float  # largest product of one feature
    published_bound: float  # p f(p l1); infinite for the law that it was not stated for

    @property
    def num_drawn(self) -> int:
        """Features that are drawn: all but the exact constant of the published law."""
        return self.num_features - 1 if self.law == "published" else self.num_features

    @property
    def is_comparable(self) -> bool:
        """Whether the variance is finite and made of degrees that the simulation has seen."""
        return math.isfinite(self.closed_square) and self.seen >= SEEN

    @property
    def place(self) -> tuple[str, str, float, float]:
        """All but the number of features."""
        return (self.kernel, self.law, self.radius, self.cosine)


def degree_rows(cells: Iterable[Config], moments: dict[float, Pair], head_dim: int) -> list[DegreeRow]:
    """One row for every sketch, number of features, cosine and degree that was measured.

    Args:
        cells: measurements of the study; those of kernels are passed over.
        moments: of the unit vectors of every cosine.
        head_dim: D.
    """
    found = _over_seeds(cells, "degree", ("sketch", "num_features"), ("cosine", "degree"))
    return [
        DegreeRow(
            bias=tuple(row["bias"] for row in rows),
            square=tuple(row["mean_square_error"] for row in rows),
            closed_bias=0.0,
            closed_square=theory.sketch_variance(sketch, moments[cosine], degree, m, head_dim),
            sketch=sketch,
            num_features=m,
            cosine=cosine,
            degree=degree,
        )
        for (sketch, m, cosine, degree), rows in found.items()
    ]


def kernel_rows(cells: Iterable[Config], moments: dict[float, Pair], num_draws: int) -> list[KernelRow]:
    """One row for every law, number of features, kernel, radius and cosine that was measured.

    Args:
        cells: measurements of the study; those of single degrees are passed over.
        moments: of the unit vectors of every cosine.
        num_draws: estimates of each seed.
    """
    found = _over_seeds(cells, "kernel", ("law", "num_features"), ("kernel", "radius", "cosine"))
    return [
        _kernel_row(law, m, KERNELS[name], radius, cosine, moments[cosine].scaled(radius), rows, num_draws)
        for (law, m, name, radius, cosine), rows in found.items()
    ]


def _kernel_row(
    law: str, m: int, kernel: Kernel, radius: float, cosine: float, pair: Pair, rows: list[Config], num_draws: int
) -> KernelRow:
    variance, bias = theory.kernel_moments(law, kernel, pair, m)
    value = theory.kernel_value(kernel, pair.dot)
    constant, linear = float(kernel.coefficient(0)), float(kernel.coefficient(1)) * pair.dot
    return KernelRow(
        bias=tuple(row["bias"] for row in rows),
        square=tuple(row["mean_square_error"] for row in rows),
        closed_bias=bias,
        closed_square=variance + bias**2,
        law=law,
        kernel=kernel.name,
        num_features=m,
        radius=radius,
        cosine=cosine,
        quantiles=tuple(map(fmean, zip(*(row["quantiles"] for row in rows), strict=True))),
        value=value,
        seen=theory.seen_share(law, kernel, pair, m * num_draws * len(rows)),
        best_square=theory.best_variance(kernel, pair, m),
        uniform=abs(value - constant),
        taylor=abs(value - constant - linear),
        bound=theory.feature_bound(law, kernel, pair.l1),
        published_bound=theory.kar_karnick_bound(kernel, pair.l1) if law == "kar_karnick" else math.inf,
    )


def degree_slopes(rows: Iterable[DegreeRow]) -> dict[tuple[str, float, int], tuple[float, float]]:
    """Slope and standard error by sketch, cosine and degree; an estimate that is exact for some M has none."""
    found: dict[tuple[str, float, int], list[DegreeRow]] = defaultdict(list)
    for row in rows:
        found[row.sketch, row.cosine, row.degree].append(row)
    inexact = {key: chosen for key, chosen in found.items() if len(chosen) > 1 and not any(r.is_exact for r in chosen)}
    return {key: slope(chosen, [row.num_features for row in chosen]) for key, chosen in inexact.items()}


def kernel_slopes(rows: Iterable[KernelRow]) -> dict[tuple[str, str, float, float], tuple[float, float]]:
    """Slope and standard error by ``KernelRow.place``, in the number of drawn features; where all M can be compared."""
    found: dict[tuple[str, str, float, float], list[KernelRow]] = defaultdict(list)
    for row in rows:
        found[row.place].append(row)
    sound = {key: chosen for key, chosen in found.items() if len(chosen) > 1 and all(r.is_comparable for r in chosen)}
    return {key: slope(chosen, [row.num_drawn for row in chosen]) for key, chosen in sound.items()}


def slope(rows: Sequence[Simulated], features: Sequence[int]) -> tuple[float, float]:
    """Slope of the logarithm of the root-mean-square error in that of M, and its standard error over seeds.

    Args:
        rows: the same estimate with every number of features.
        features: M of each row.
    """
    seeds = [_slope(features, [row.square[i] for row in rows]) for i in range(len(rows[0].square))]
    return _slope(features, [fmean(row.square) for row in rows]), standard_error(seeds)


def _slope(features: Sequence[int], squares: Sequence[float]) -> float:
    x = [math.log(m) for m in features]
    y = [math.log(square) / 2 for square in squares]
    centre = fmean(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def exceeded_by_chance(errors: float, freedom: int) -> float:
    """Probability that a mean over ``freedom`` + 1 seeds is further off than so many of its own standard errors.

    P(|t| > errors) of Student's t, from the finite series for a whole number of degrees of freedom.
    """
    angle = math.atan(errors / math.sqrt(freedom))
    term = math.cos(angle) if freedom % 2 else 1.0
    series = 0.0
    for step in range(freedom // 2):
        series += term
        start = 2 * step + (2 if freedom % 2 else 1)
        term *= start / (start + 1) * math.cos(angle) ** 2
    if freedom % 2 == 0:
        return 1 - math.sin(angle) * series
    return 1 - 2 / math.pi * (angle + math.sin(angle) * series)


def finite(value: float) -> float | None:
    """The value, or None for what cannot exist."""
    return value if math.isfinite(value) else None


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    return stdev(values) / math.sqrt(len(values))


def _over_seeds(
    cells: Iterable[Config], part: str, outer: Sequence[str], inner: Sequence[str]
) -> dict[tuple, list[Config]]:
    """The rows of every seed by what names the cell and what names the row in it."""
    found: dict[tuple, list[Config]] = defaultdict(list)
    for cell in cells:
        if cell["part"] == part:
            for row in cell["errors"]:
                found[(*(cell[name] for name in outer), *(row[name] for name in inner))].append(row)
    return found
