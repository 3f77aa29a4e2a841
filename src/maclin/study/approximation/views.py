"""Tables, charts and heat maps of the approximation study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...records import Cell, Config, HeatMap, Line, LineChart, StudyTable
from ..latencies import EXACT, latency
from .cells import REAL_LENGTH, TAYLOR, UNIFORM, macformer_name, subject_name

if TYPE_CHECKING:
    from . import ApproximationStudy

_BASELINES = (UNIFORM, TAYLOR)
_NOTE = "Normalised mean-square error is the square of the relative error ||out - exact|| / ||exact||."


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest over seeds."""

    median: float
    low: float
    high: float


class Measured:
    """Errors by what they belong to; None where a cell could not be measured."""

    def __init__(self, cells: Iterable[Config]) -> None:
        self._values: dict[tuple[object, ...], list[float]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        for cell in cells:
            for row in cell["errors"]:
                if row["nmse"] is None:
                    self.reasons[row["method"], row["num_features"]] = row["reason"]
                    continue
                name = (cell["data"], cell["scale"], row["kernel"], row["method"], row["num_features"], cell["length"])
                self._values.setdefault(name, []).append(row["nmse"])

    def spread(
        self, data: str, scale: float, kernel: str, method: str, num_features: int, length: int
    ) -> Spread | None:
        """Normalised mean-square error over seeds."""
        values = self._values.get((data, scale, kernel, method, num_features, length))
        return None if not values else Spread(statistics.median(values), min(values), max(values))

    def nmse(self, data: str, scale: float, kernel: str, method: str, num_features: int, length: int) -> float | None:
        """Median over seeds."""
        found = self.spread(data, scale, kernel, method, num_features, length)
        return None if found is None else found.median


def methods_of(job: ApproximationStudy, kernel: str) -> list[str]:
    """Methods with a number of features."""
    return [*map(macformer_name, job.estimators), *(["rfa", "favor"] if kernel == "exp" else [])]


def length_for(job: ApproximationStudy, data: str) -> int:
    """Length of tables and of charts over features."""
    return REAL_LENGTH if data == "real" else job.reference_length


def tables_of(job: ApproximationStudy, cells: Sequence[Config], timed: Sequence[Config]) -> tuple[StudyTable, ...]:
    """Errors of every kernel and method at the reference length and number of features; latencies by length."""
    return (_error_table(job, Measured(cells)), _time_table(job, timed))


def _error_table(job: ApproximationStudy, found: Measured) -> StudyTable:
    m = job.reference_features
    views = [(data, scale) for data in job.data for scale in job.scales]
    rows: list[tuple[Cell, ...]] = []
    for kernel in job.kernels:
        for method, num in [(name, 0) for name in (*_BASELINES, EXACT)] + [(n, m) for n in methods_of(job, kernel)]:
            squares = [found.nmse(data, scale, kernel, method, num, length_for(job, data)) for data, scale in views]
            errors = [None if square is None else math.sqrt(square) for square in squares]
            rows.append((kernel, method, _features(method, m), *errors))
    return StudyTable(
        title="Relative error of the attention output, by kernel and method",
        columns=("kernel", "method", "features", *(f"{data}, |t| <= {scale:g}" for data, scale in views)),
        rows=tuple(rows),
        note=f"Median of {job.num_seeds} seeds at {job.reference_length} tokens (real: {REAL_LENGTH}), "
        f"against exact attention of the kernel in float64. {UNIFORM} averages the values; {TAYLOR} keeps the "
        f"constant and the linear term; {EXACT} shows how far the kernel itself is from softmax."
        + _unavailable(found, m),
    )


def _features(method: str, num_features: int) -> Cell:
    if method == EXACT:
        return None
    return {UNIFORM: 1.0, TAYLOR: "D + 1"}.get(method, float(num_features))


def _unavailable(found: Measured, num_features: int) -> str:
    reasons = [f"{method}: {why}" for (method, m), why in found.reasons.items() if m == num_features]
    return "".join(f" n/a: {reason}." for reason in reasons)


def _time_table(job: ApproximationStudy, timed: Sequence[Config]) -> StudyTable:
    m = job.reference_features
    subjects = [(name, 0) for name in (EXACT, *_BASELINES)] + [(name, m) for name in methods_of(job, "exp")]
    return StudyTable(
        title=f"Latency in ms by length, {m} features",
        columns=("method", *(f"{cell['length']} tokens" for cell in timed)),
        rows=tuple((name, *(_timed(cell, name, num) for cell in timed)) for name, num in subjects),
        note=f"One head of width {job.head_dim}, kernel exp, median of runs made in turns; {EXACT} is torch's fused "
        "scaled_dot_product_attention. n/a: would have taken longer than the limit, or the method needs more features.",
    )


def _timed(cell: Config, method: str, num_features: int, field: str = "latency_ms") -> float | None:
    return latency(cell, subject_name(method, num_features), field)


def heat_maps_of(job: ApproximationStudy, cells: Sequence[Config]) -> tuple[HeatMap, ...]:
    """log10 of the error over length and features: one for each kernel, estimator and scale, on the first data."""
    found, data = Measured(cells), job.data[0]
    lengths = (REAL_LENGTH,) if data == "real" else job.lengths
    maps: list[HeatMap] = []
    for scale in job.scales:
        for kernel in job.kernels:
            for estimator in job.estimators:
                name = macformer_name(estimator)
                values = [
                    [_log(found.nmse(data, scale, kernel, name, m, length)) for m in job.features] for length in lengths
                ]
                flat = [_log(found.nmse(data, scale, kernel, UNIFORM, 0, length)) for length in lengths]
                linear = [_log(found.nmse(data, scale, kernel, TAYLOR, 0, length)) for length in lengths]
                maps.append(
                    HeatMap(
                        title=f"{name}, kernel {kernel}, |t| <= {scale:g}, {data} data",
                        x_label="features",
                        y_label="tokens",
                        value_label="log10 of the normalised mean-square error",
                        x=(UNIFORM, TAYLOR, *(str(m) for m in job.features)),
                        y=tuple(str(length) for length in lengths),
                        values=tuple((u, t, *row) for u, t, row in zip(flat, linear, values, strict=True)),
                        note=_NOTE + " n/a: the estimator needs more features.",
                    )
                )
    return tuple(maps)


def _log(value: float | None) -> float | None:
    return None if value is None or value <= 0 else math.log10(value)


def charts_of(job: ApproximationStudy, cells: Sequence[Config], timed: Sequence[Config]) -> tuple[LineChart, ...]:
    """Error over features and over length, latency over length and over features."""
    found = Measured(cells)
    first, rest = job.data[0], job.data[1:]
    charts = [_over_features(job, found, first, scale, kernel) for scale in job.scales for kernel in job.kernels]
    charts += [_over_features(job, found, data, scale, job.kernels[0]) for data in rest for scale in job.scales]
    drawn = [data for data in job.data if data != "real"][:1]
    charts += [_over_length(job, found, data, scale, kernel) for data in drawn for scale in job.scales
               for kernel in job.kernels]  # fmt: skip
    return (*charts, _time_over_length(job, timed), _time_over_features(job, timed))


def _over_features(job: ApproximationStudy, found: Measured, data: str, scale: float, kernel: str) -> LineChart:
    length = length_for(job, data)
    lines = [
        _line(name, job.features, [found.spread(data, scale, kernel, name, m, length) for m in job.features])
        for name in methods_of(job, kernel)
    ]
    for name in _BASELINES:
        value = found.spread(data, scale, kernel, name, 0, length)
        lines.append(_line(name, job.features, [value] * len(job.features), is_baseline=True))
    return LineChart(
        title=f"Error over features: kernel {kernel}, |t| <= {scale:g}, {data} data, {length} tokens",
        x_label="features",
        y_label="normalised mean-square error",
        lines=tuple(lines),
        log_x=True,
        log_y=True,
        note=f"Median of {job.num_seeds} seeds with smallest and largest. {TAYLOR} has D + 1 features whatever x says.",
    )


def _over_length(job: ApproximationStudy, found: Measured, data: str, scale: float, kernel: str) -> LineChart:
    m = job.reference_features
    named = [(name, 0, True) for name in _BASELINES] + [(name, m, False) for name in methods_of(job, kernel)]
    return LineChart(
        title=f"Error over length: kernel {kernel}, |t| <= {scale:g}, {data} data, {m} features",
        x_label="tokens",
        y_label="normalised mean-square error",
        lines=tuple(
            _line(
                name,
                job.lengths,
                [found.spread(data, scale, kernel, name, num, length) for length in job.lengths],
                is_baseline=baseline,
            )
            for name, num, baseline in named
        ),
        log_x=True,
        log_y=True,
        note=f"Median of {job.num_seeds} seeds with smallest and largest.",
    )


def _line(name: str, x: Sequence[int], spreads: Sequence[Spread | None], is_baseline: bool = False) -> Line:
    return Line(
        name,
        tuple(map(float, x)),
        tuple(None if s is None else s.median for s in spreads),
        tuple(None if s is None else s.low for s in spreads),
        tuple(None if s is None else s.high for s in spreads),
        is_baseline,
    )


def _time_over_length(job: ApproximationStudy, timed: Sequence[Config]) -> LineChart:
    m = job.reference_features
    named = [(EXACT, 0), *((name, 0) for name in _BASELINES), *((name, m) for name in methods_of(job, "exp"))]
    lengths = [cell["length"] for cell in timed]
    return LineChart(
        title=f"Latency over length, {m} features",
        x_label="tokens",
        y_label="latency (ms)",
        lines=tuple(_timed_line(name, lengths, timed, [num] * len(timed)) for name, num in named),
        log_x=True,
        log_y=True,
        note=f"One head of width {job.head_dim}, medians with quartiles, measured in turns.",
    )


def _time_over_features(job: ApproximationStudy, timed: Sequence[Config]) -> LineChart:
    cell = next(cell for cell in timed if cell["length"] == job.reference_length)
    again = [cell] * len(job.features)
    fixed = [_timed_line(name, job.features, again, [0] * len(again)) for name in (EXACT, *_BASELINES)]
    return LineChart(
        title=f"Latency over features, {job.reference_length} tokens",
        x_label="features",
        y_label="latency (ms)",
        lines=(*fixed, *(_timed_line(name, job.features, again, job.features) for name in methods_of(job, "exp"))),
        log_x=True,
        log_y=True,
        note=f"One head of width {job.head_dim}, medians with quartiles, measured in turns.",
    )


def _timed_line(name: str, x: Sequence[int], cells: Sequence[Config], features: Sequence[int]) -> Line:
    y, low, high = (
        tuple(_timed(cell, name, m, field) for cell, m in zip(cells, features, strict=True))
        for field in ("latency_ms", "latency_ms_low", "latency_ms_high")
    )
    return Line(name, tuple(map(float, x)), y, low, high, name in (EXACT, *_BASELINES))
