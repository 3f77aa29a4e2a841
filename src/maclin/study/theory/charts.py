"""The charts and heat maps of the theory study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ...core.kernels import KERNELS
from ...records import HeatMap, Line, LineChart
from . import variance as theory
from .rows import FAILURE, DegreeRow, KernelRow, Simulated, degree_slopes, finite
from .variance import Pair

if TYPE_CHECKING:
    from . import TheoryStudy

_CURVE = 25  # points of a curve that is only calculated


def degree_chart(job: TheoryStudy, rows: Sequence[DegreeRow], cosine: float) -> LineChart:
    """Error over the degree, a line for each sketch."""
    lines = []
    for sketch in job.sketches:
        chosen = [row for row in rows if row.sketch == sketch and row.cosine == cosine]
        lines.append(_simulated(sketch, [row.degree for row in chosen], chosen, [1.0] * len(chosen)))
    n = [float(degree) for degree in range(1, job.max_degree + 1)]
    lines.append(Line("estimate 0", tuple(n), tuple(abs(cosine) ** d for d in n), is_baseline=True))
    return LineChart(
        f"Error of <x, y>^n by {job.head_dim} features, cosine {cosine:g}",
        "degree n",
        "RMS error, unit vectors",
        tuple(lines),
        log_y=True,
        note="Simulated; the band holds every seed. What is exact has no point.",
    )


def features_chart(job: TheoryStudy, kernels: Sequence[KernelRow]) -> Iterable[LineChart]:
    """Error of the first kernel over M at the radius nearest to 1 where simulation and closed form can be compared."""
    kernel, cosine = job.kernels[0], job.cosines[0]
    here = [row for row in kernels if (row.kernel, row.cosine) == (kernel, cosine)]
    unseen = {row.radius for row in here if not row.is_comparable}
    radii = {row.radius for row in here}
    if not radii:
        return
    radius = min(radii - unseen or radii, key=lambda r: abs(math.log(r)))
    chosen = [row for row in here if row.radius == radius]
    lines = []
    for law in job.laws:
        rows = [row for row in chosen if row.law == law]
        m = [row.num_features for row in rows]
        lines.append(_simulated(f"{law}, simulated", m, rows, [row.value for row in rows]))
        closed = (finite(math.sqrt(row.closed_square) / row.value) for row in rows)
        lines.append(Line(f"{law}, closed form", tuple(map(float, m)), tuple(closed)))
    rows = [row for row in chosen if row.law == job.laws[0]]
    m = tuple(float(row.num_features) for row in rows)
    best = (finite(math.sqrt(row.best_square) / row.value) for row in rows)
    lines.append(Line("best law for this pair, closed form", m, tuple(best)))
    lines.append(Line("uniform: f(0)", m, tuple(row.uniform / row.value for row in rows), is_baseline=True))
    lines.append(Line("a_0 + a_1 t", m, tuple(row.taylor / row.value for row in rows), is_baseline=True))
    yield LineChart(
        f"Error of the kernel {kernel} over the number of features, radius {radius:g}, cosine {cosine:g}",
        "number of features M",
        "RMS error / f(t)",
        tuple(lines),
        log_x=True,
        log_y=True,
        note="The band holds every seed.",
    )


def radius_chart(job: TheoryStudy, unit: Pair, cosine: float, m: int) -> Iterable[LineChart]:
    """Error of the first kernel over the radius, in closed form; nothing where the study has one radius only."""
    kernel = KERNELS[job.kernels[0]]
    low, high = min(job.radii), max(job.radii)
    if low == high:
        return
    radii = [low * (high / low) ** (i / (_CURVE - 1)) for i in range(_CURVE)]
    radii = [radius for radius in radii if abs(unit.scaled(radius).dot) < kernel.radius]
    pairs = [unit.scaled(radius) for radius in radii]
    values = [theory.kernel_value(kernel, pair.dot) for pair in pairs]

    def line(name: str, errors: Iterable[float], is_baseline: bool = False) -> Line:
        y = tuple(finite(error / value) for error, value in zip(errors, values, strict=True))
        return Line(name, tuple(radii), y, is_baseline=is_baseline)

    def root(law: str, pair: Pair) -> float:
        variance, bias = theory.kernel_moments(law, kernel, pair, m)
        return math.sqrt(variance + bias**2)

    constant, linear = kernel.coefficient(0), kernel.coefficient(1)
    lines = [line(law, (root(law, pair) for pair in pairs)) for law in job.laws]
    lines.append(line("best law for each pair", (math.sqrt(theory.best_variance(kernel, pair, m)) for pair in pairs)))
    lines.append(line("uniform: f(0)", (abs(value - constant) for value in values), True))
    taylor = (abs(value - constant - linear * pair.dot) for value, pair in zip(values, pairs, strict=True))
    lines.append(line("a_0 + a_1 t", taylor, True))
    yield LineChart(
        f"Error of the kernel {kernel.name} over the radius, cosine {cosine:g}, {m} features, in closed form",
        "radius |x||y|",
        "RMS error / f(t)",
        tuple(lines),
        log_x=True,
        log_y=True,
    )


def bound_chart(job: TheoryStudy, kernels: Sequence[KernelRow]) -> Iterable[LineChart]:
    """Bounds and measured quantile over M, for the smallest radius; nothing where the kernel is not defined there."""
    law = "kar_karnick" if "kar_karnick" in job.laws else job.laws[0]
    place = (job.kernels[0], law, min(job.radii), job.cosines[0])
    rows = [row for row in kernels if row.place == place]
    if not rows:
        return
    m = tuple(float(row.num_features) for row in rows)
    lines = [Line("measured, 99% of the draws", m, tuple(row.quantiles[-1] / row.value for row in rows))]
    promised = {
        "Chebyshev, 99%": [math.sqrt(row.closed_square / FAILURE) for row in rows],
        "Hoeffding, 99%, largest product": [theory.hoeffding_error(row.bound, row.num_drawn, FAILURE) for row in rows],
        "Hoeffding, 99%, C = p f(p R²)": [
            theory.hoeffding_error(row.published_bound, row.num_drawn, FAILURE) for row in rows
        ],
    }
    for name, errors in promised.items():
        y = tuple(finite(error / row.value) for error, row in zip(errors, rows, strict=True))
        if any(value is not None for value in y):
            lines.append(Line(name, m, y))
    lines.append(Line("f(t) itself: vacuous above", m, (1.0,) * len(m), is_baseline=True))
    lines.append(Line("uniform: f(0)", m, tuple(row.uniform / row.value for row in rows), is_baseline=True))
    yield LineChart(
        f"What is promised and what is measured: {place[0]}, {law}, radius {place[2]:g}, cosine {place[3]:g}",
        "number of features M",
        "error / f(t)",
        tuple(lines),
        log_x=True,
        log_y=True,
        note="The smallest radius of the study, where the bound is tightest.",
    )


def agreement_map(job: TheoryStudy, rows: Sequence[DegreeRow]) -> HeatMap:
    """Simulated over closed variance of single degrees."""
    return _degree_map(
        job,
        f"Simulated variance over closed form, {job.head_dim} features",
        "simulated / closed",
        {(row.sketch, row.cosine, row.degree): None if row.is_exact else row.ratio for row in rows},
        "1 is agreement. n/a: the sketch is exact there.",
    )


def slope_map(job: TheoryStudy, rows: Sequence[DegreeRow]) -> HeatMap:
    """Slopes in M of single degrees."""
    found = {key: value[0] for key, value in degree_slopes(rows).items()}
    return _degree_map(
        job,
        f"Slope of the logarithm of the error in that of M, M = {', '.join(map(str, job.sketch_features))}",
        "slope",
        found,
        "-0.5 for independent features. n/a: exact for some of these numbers of features.",
    )


def _degree_map(
    job: TheoryStudy, title: str, label: str, values: Mapping[tuple[str, float, int], float | None], note: str
) -> HeatMap:
    rows = [(sketch, cosine) for sketch in job.sketches for cosine in job.cosines]
    degrees = range(1, job.max_degree + 1)
    return HeatMap(
        title,
        "degree n",
        "sketch, cosine",
        label,
        tuple(map(str, degrees)),
        tuple(f"{sketch}, {cosine:g}" for sketch, cosine in rows),
        tuple(tuple(values.get((*row, degree)) for degree in degrees) for row in rows),
        note,
    )


def _simulated(name: str, x: Sequence[float], rows: Sequence[Simulated], units: Sequence[float]) -> Line:
    def over(values: Iterable[float]) -> tuple[float | None, ...]:
        exact = [row.closed_square < 1e-12 for row in rows]
        return tuple(
            None if zero else math.sqrt(max(value, 0.0)) / unit
            for zero, value, unit in zip(exact, values, units, strict=True)
        )

    return Line(
        name,
        tuple(map(float, x)),
        over(fmean(row.square) for row in rows),
        over(min(row.square) for row in rows),
        over(max(row.square) for row in rows),
    )
