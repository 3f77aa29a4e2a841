"""The tables of the theory study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ...records import Cell, StudyTable
from . import variance as theory
from .rows import FAILURE, QUANTILES, SEEN, DegreeRow, KernelRow, finite, kernel_slopes

if TYPE_CHECKING:
    from . import TheoryStudy


def degree_table(job: TheoryStudy, rows: Iterable[DegreeRow]) -> StudyTable:
    """Single degrees with as many features as the vectors are wide."""
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        cells.append(
            (
                row.sketch,
                f"{row.cosine:g}",
                row.degree,
                0.0 if row.is_exact else math.sqrt(row.closed_square),
                None if row.is_exact else math.sqrt(fmean(row.square)),
                None if row.is_exact else row.ratio,
                None if row.is_exact else row.ratio_error,
                None if row.is_exact else row.bias_errors,
                abs(row.cosine) ** row.degree,
            )
        )
    return StudyTable(
        f"Error of <x, y>^n by {job.head_dim} features of one degree, D = {job.head_dim}, unit vectors",
        (
            "sketch",
            "cosine",
            "degree n",
            "RMS error, closed form",
            "RMS error, simulated",
            "variance, simulated / closed",
            "standard error of the ratio",
            "bias, standard errors",
            "baseline: estimate 0",
        ),
        tuple(cells),
        "n/a: the sketch is exact there, and rounding is all that could be compared. Sketches: "
        + "; ".join(f"{name}: {theory.SKETCHES[name]}" for name in job.sketches)
        + ".",
    )


def kernel_table(kernels: Sequence[KernelRow], at_m: Iterable[KernelRow], m: int) -> StudyTable:
    """Kernels with M features, with the slope over all M."""
    slopes = kernel_slopes(kernels)
    cells: list[tuple[Cell, ...]] = []
    for row in at_m:
        found = slopes.get(row.place)
        finite = math.isfinite(row.closed_square)
        cells.append(
            (
                row.kernel,
                row.law,
                f"{row.radius:g}",
                f"{row.cosine:g}",
                math.sqrt(row.closed_square) / row.value if finite else None,
                math.sqrt(fmean(row.square)) / row.value,
                row.ratio if row.is_comparable else None,
                row.ratio_error if row.is_comparable else None,
                row.seen if finite else None,
                row.bias_errors if row.is_comparable else None,
                found[0] if found else None,
                math.sqrt(row.best_square) / row.value if math.isfinite(row.best_square) else None,
                row.uniform / row.value,
                row.taylor / row.value,
            )
        )
    return StudyTable(
        f"Relative root-mean-square error of f(t), t = radius x cosine, with {m} features",
        (
            "kernel",
            "law",
            "radius",
            "cosine",
            "closed form",
            "simulated",
            "mean square, simulated / closed",
            "standard error of the ratio",
            "share of the variance seen",
            "bias, standard errors",
            "slope in M",
            "best law for this pair",
            "baseline: uniform, f(0)",
            "baseline: a_0 + a_1 t",
        ),
        tuple(cells),
        "n/a under closed form: the variance of the law is infinite. n/a further on: less than "
        f"{SEEN:.0%} of the variance comes from degrees that the simulation can be expected to show, so that its error "
        "is that of a sample without the rare large draws. The best law has P(n) proportional to a_n mu^(n/2) and an "
        "exact constant. A kernel outside its domain has no row.",
    )


def bound_table(at_m: Iterable[KernelRow], m: int) -> StudyTable:
    """What Hoeffding and Chebyshev promise, and from which M on that is worth something."""
    cells: list[tuple[Cell, ...]] = []
    for row in at_m:
        drawn, value, bias = row.num_drawn, row.value, abs(row.closed_bias)
        variance = row.closed_square - row.closed_bias**2
        cells.append(
            (
                row.kernel,
                row.law,
                f"{row.radius:g}",
                f"{row.cosine:g}",
                *(q / value for q in row.quantiles),
                *(finite((theory.hoeffding_error(row.bound, drawn, 1 - q) + bias) / value) for q in QUANTILES),
                finite((math.sqrt(variance / FAILURE) + bias) / value),
                finite(theory.hoeffding_features(row.bound, value, FAILURE)),
                finite(theory.hoeffding_features(row.published_bound, value, FAILURE)),
                finite(theory.hoeffding_features(row.bound, 0.1 * value)),
                row.uniform / value,
            )
        )
    shares = [f"{q:.0%}" for q in QUANTILES]
    return StudyTable(
        f"Error over f(t) with {m} features: what is seen, and what is promised",
        (
            "kernel",
            "law",
            "radius",
            "cosine",
            *(f"seen in {share}" for share in shares),
            *(f"bound for {share}" for share in shares),
            "by variance, 99%",
            "bound below f(t) from M",
            "the same, C = p f(p R²)",
            "10% of f(t) from M",
            "baseline: f(0)",
        ),
        tuple(cells),
        "Seen: the error that so many of the draws do not exceed. Bound: Hoeffding's, |estimate - f| <= C sqrt(2 "
        "log(2 / failure) / M) for products of one feature in [-C, C]. C is the largest product, max_n a_n / P(n) "
        "(|x|_1 |y|_1)^n; Kar & Karnick state C = p f(p R²), p = 2, R the l1 radius, which is larger. A bound above "
        "1 is vacuous: it allows an error of f(t) itself. Below f(t): from so many features on the bound for 99% of "
        "the draws is not vacuous. 10%: from so many on the probability of that error has a bound below 1 at all. "
        "By variance: Chebyshev's inequality with the closed form. f(0): uniform weights. n/a: a bound or a "
        "variance is infinite, or the bound was stated for the other law only.",
    )
