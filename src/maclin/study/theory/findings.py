"""What the theory study found: its sentences, and everything that is drawn from its measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

from ...records import HeatMap, LineChart, StudyTable
from . import charts as charts
from . import tables as tables
from . import variance as theory
from .rows import CHANCE, FAILURE, DegreeRow, KernelRow, Simulated, degree_slopes, kernel_slopes
from .variance import Pair

if TYPE_CHECKING:
    from . import TheoryStudy

_USUAL = 128  # features; the tables are about the measured number that is nearest
_MOSTLY = 0.9  # share of the figures that must agree for the answer to be yes


@dataclass(frozen=True)
class Found:
    """The parts of a ``Study`` that are drawn from its measurements."""

    findings: tuple[str, ...]
    tables: tuple[StudyTable, ...]
    charts: tuple[LineChart, ...]
    heat_maps: tuple[HeatMap, ...]
    warnings: tuple[str, ...]


def found(
    job: TheoryStudy, moments: dict[float, Pair], degrees: Sequence[DegreeRow], kernels: Sequence[KernelRow]
) -> Found:
    """Findings, tables and charts.

    Args:
        job: settings of the study.
        moments: of the unit vectors of every cosine.
        degrees: all rows of single degrees.
        kernels: all rows of kernels.
    """
    m = min(job.features, key=lambda features: abs(math.log(features / _USUAL)))
    at_width = [row for row in degrees if row.num_features == job.head_dim]
    at_m = [row for row in kernels if row.num_features == m]
    return Found(
        findings=tuple(_findings(job, degrees, kernels, at_width, at_m, m)),
        tables=(
            tables.degree_table(job, at_width),
            tables.kernel_table(kernels, at_m, m),
            tables.bound_table(at_m, m),
        ),
        charts=(
            *(charts.degree_chart(job, at_width, cosine) for cosine in job.cosines),
            *charts.features_chart(job, kernels),
            *(chart for cosine in job.cosines for chart in charts.radius_chart(job, moments[cosine], cosine, m)),
            *charts.bound_chart(job, kernels),
        ),
        heat_maps=(charts.agreement_map(job, at_width), charts.slope_map(job, degrees)),
        warnings=tuple(_warnings(kernels)),
    )


def _findings(
    job: TheoryStudy,
    degrees: Sequence[DegreeRow],
    kernels: Sequence[KernelRow],
    at_width: Sequence[DegreeRow],
    at_m: Sequence[KernelRow],
    m: int,
) -> Iterable[str]:
    compared: list[Simulated] = [row for row in degrees if not row.is_exact]
    compared += [row for row in kernels if row.is_comparable]
    yield _closed_forms(compared)
    yield _bound(at_m, m)
    yield _bias_and_slope(job, degrees, kernels, compared)
    if "rademacher" in job.sketches and len(job.sketches) > 1:
        yield _sketches(job, at_width)
    yield from _laws(job, at_m, m)


def _closed_forms(compared: Sequence[Simulated]) -> str:
    ratios = sorted(row.ratio or 0.0 for row in compared)
    agree = sum(row.agrees for row in compared)
    answer = "predict the error" if agree >= _MOSTLY * len(compared) else "do not predict the error"
    return (
        f"The closed forms {answer}: in {agree} of {len(compared)} figures the simulated mean-square error differs "
        f"from them by no more than chance does in {1 - CHANCE:.1%} of cases; nine tenths of the figures are "
        f"{_quantile(ratios, 0.05):.3f} to {_quantile(ratios, 0.95):.3f} times the closed form."
    )


def _bound(at_m: Sequence[KernelRow], m: int) -> str:
    needed = {row.place: theory.hoeffding_features(row.bound, row.value, FAILURE) for row in at_m}
    useful = [row for row in at_m if needed[row.place] <= row.num_drawn]
    best = min(at_m, key=lambda row: needed[row.place])
    says = f"says something in {len(useful)} of {len(at_m)} cases: elsewhere" if useful else "says nothing:"
    return (
        f"With {m} features the concentration bound {says} the error that it allows for 99% of the draws is above f(t) "
        f"itself. It comes below f(t) from {_amount(needed[best.place])} features on at the earliest ({best.kernel}, "
        f"{best.law}, radius {best.radius:g}, cosine {best.cosine:g}), where the measured 99% quantile with {m} is "
        f"{best.quantiles[-1] / best.value:.3g} f(t)."
    )


def _bias_and_slope(
    job: TheoryStudy, degrees: Sequence[DegreeRow], kernels: Sequence[KernelRow], compared: Sequence[Simulated]
) -> str:
    unbiased = sum(row.is_unbiased for row in compared)
    independent = [row for row in degrees if row.sketch != "srht"]
    slopes = [value for value, _ in degree_slopes(independent).values()]
    slopes += [value for value, _ in kernel_slopes([row for row in kernels if row.is_comparable]).values()]
    sentence = f"By the same measure there is no bias in {unbiased} of {len(compared)} figures"
    if slopes:
        sentence += (
            f"; the error falls as M to the power {median(slopes):.3f} ({min(slopes):.3f} to {max(slopes):.3f}) for "
            "independent features"
        )
    return sentence + "."


def _sketches(job: TheoryStudy, at_width: Sequence[DegreeRow]) -> str:
    base = {(row.cosine, row.degree): row.closed_square for row in at_width if row.sketch == "rademacher"}
    parts = []
    for sketch in job.sketches:
        rows = [row for row in at_width if row.sketch == sketch and sketch != "rademacher"]
        factors = [math.sqrt(row.closed_square / base[row.cosine, row.degree]) for row in rows if not row.is_exact]
        if factors:
            exact = sorted({row.degree for row in rows if row.is_exact})
            tail = f" and exact at degree {', '.join(map(str, exact))}" if exact else ""
            parts.append(f"{sketch} {geometric_mean(factors):.3g} ({min(factors):.3g} to {max(factors):.3g}){tail}")
    return (
        f"Error of a single degree over that of random signs with M = D = {job.head_dim}, geometric mean over degrees "
        f"and cosines (range): {'; '.join(parts)}."
    )


def _laws(job: TheoryStudy, at_m: Sequence[KernelRow], m: int) -> Iterable[str]:
    finite_rows = [row for row in at_m if math.isfinite(row.closed_square)]
    by_place: dict[tuple[str, float, float], dict[str, float]] = {}
    for row in finite_rows:
        by_place.setdefault((row.kernel, row.radius, row.cosine), {})[row.law] = math.sqrt(row.closed_square)
    both = [errors for errors in by_place.values() if len(errors) == 2]
    sentence = ""
    if both:
        factors = [errors["kar_karnick"] / errors["published"] for errors in both]
        sentence = (
            f"The error of the law kar_karnick is {median(factors):.3g} times that of the published one in the median "
            f"({min(factors):.3g} to {max(factors):.3g}). "
        )
    places = {(row.kernel, row.radius, row.cosine): row for row in at_m}
    errors = [(min(by_place.get(place, {"none": math.inf}).values()), row) for place, row in places.items()]
    uniform = sum(error < row.uniform for error, row in errors)
    taylor = sum(error < row.taylor for error, row in errors)
    yield (
        f"{sentence}With {m} features the better law has a smaller error than uniform weights, f(0) for every pair, in "
        f"{uniform} of {len(errors)} cases, and than the exact constant and linear term in {taylor}."
    )


def _warnings(kernels: Sequence[KernelRow]) -> Iterable[str]:
    unseen = sum(not row.is_comparable for row in kernels)
    if unseen:
        yield (
            f"In {unseen} of {len(kernels)} figures of kernels the variance is infinite or made of degrees that the "
            "simulation has hardly drawn; they stand in the tables, but the comparison does not count them."
        )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _amount(number: float) -> str:
    if not math.isfinite(number):
        return "no number of"
    return f"{number:,.0f}" if number < 1e6 else f"{number:.2g}"
