"""Charts and heat maps of the projection study."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...records import Config, HeatMap, Line, LineChart
from ..latencies import EXACT, latency
from .cells import K_FREE, POOLED, linformer_name
from .views import CUT, Measurements, middle

if TYPE_CHECKING:
    from . import ProjectionStudy


def charts_of(job: ProjectionStudy, found: Measurements) -> tuple[LineChart, ...]:
    """Error over k, spectrum, latency over k and over length, accuracy over k."""
    return (
        _error_chart(job, found),
        _spectrum_chart(found),
        _time_over_k(job, found),
        _time_over_length(job, found),
        _accuracy_chart(job, found),
    )


def _error_chart(job: ProjectionStudy, found: Measurements) -> LineChart:
    lens = _shorter(job)
    lines = [_flat(name, lens, found.method_errors(name), name == "uniform") for name in K_FREE]
    for name in POOLED:
        if name in job.projections:
            lines.append(_line(name, lens, [found.method_errors("linformer", name, k) for k in lens]))
    if found.fits:
        lines += [_line(f"learned, {s}", lens, [found.fit_errors(s, k) for k in lens]) for s in job.sharings]
    lines.append(_line(CUT, lens, [found.cut_errors(k) for k in lens]))
    return LineChart(
        title="Relative error on real attention over k",
        x_label="k",
        y_label="relative error",
        lines=tuple(lines),
        log_x=True,
        log_y=True,
        note=f"Median over layers, with the best and the worst; held-out documents. With k = {job.length}, as many "
        "slots as keys, pooling is exact.",
    )


def _shorter(job: ProjectionStudy) -> list[int]:
    """The measured k below the length, where an error is left."""
    return [k for k in job.proj_lens if k < job.length]


def _spectrum_chart(found: Measurements) -> LineChart:
    heads = found.heads()
    index = heads[0]["index"]
    named = (("energy (squares)", "energy"), ("sum of singular values", "singular_sum"))
    return LineChart(
        title="Cumulated spectrum of the exact attention matrices",
        x_label="singular values kept",
        y_label="share held",
        lines=(
            *(_line(name, index, [[h[field][i] for h in heads] for i in range(len(index))]) for name, field in named),
            _flat("uniform attention", index, [1.0], True),
        ),
        log_x=True,
        note="Median over heads, layers and documents, with the smallest and the largest.",
    )


def _time_over_k(job: ProjectionStudy, found: Measurements) -> LineChart:
    cell = found.timed[-1]
    fixed = [_timed(name, job.proj_lens, [cell] * len(job.proj_lens), [name] * len(job.proj_lens), True)
             for name in (EXACT, *K_FREE)]  # fmt: skip
    varied = [
        _timed(name, job.proj_lens, [cell] * len(job.proj_lens), [linformer_name(name, k) for k in job.proj_lens])
        for name in job.projections
    ]
    return LineChart(
        title=f"Latency over k, {cell['length']} tokens",
        x_label="k",
        y_label="latency (ms)",
        lines=(*fixed, *varied),
        log_x=True,
        log_y=True,
        note=f"{job.num_heads} heads of width {job.head_dim}, medians with quartiles, measured in turns.",
    )


def _time_over_length(job: ProjectionStudy, found: Measurements) -> LineChart:
    lengths = [cell["length"] for cell in found.timed]
    names = [EXACT, *K_FREE]
    for name in ("learned", "mean-pool"):
        if name in job.projections:
            names += [linformer_name(name, k) for k in job.proj_lens]
    return LineChart(
        title="Latency over length",
        x_label="tokens",
        y_label="latency (ms)",
        lines=tuple(
            _timed(name, lengths, found.timed, [name] * len(lengths), name in (EXACT, *K_FREE)) for name in names
        ),
        log_x=True,
        log_y=True,
        note=f"{job.num_heads} heads of width {job.head_dim}, medians with quartiles, measured in turns.",
    )


def _accuracy_chart(job: ProjectionStudy, found: Measurements) -> LineChart:
    lens = job.trained_lens
    lines = [_flat("majority label", lens, [found.majority], True)]
    for shown, name in ((EXACT, "softmax"), *K_FREE.items()):
        lines.append(_flat(shown, lens, found.accuracies(name, None, None, None), shown == "uniform"))
    for sharing in job.trained_sharings if "learned" in job.projections else ():
        lines.append(_line(f"learned, {sharing}", lens,
                           [found.accuracies("linformer", "learned", sharing, k) for k in lens]))  # fmt: skip
    for name in POOLED:
        if name in job.projections:
            lines.append(_line(name, lens, [found.accuracies("linformer", name, None, k) for k in lens]))
    return LineChart(
        title="Held-out accuracy after training over k",
        x_label="k",
        y_label="accuracy",
        lines=tuple(lines),
        log_x=True,
        note=f"Median of {job.num_seeds} seed(s), with the lowest and the highest.",
    )


def heat_maps_of(job: ProjectionStudy, found: Measurements) -> tuple[HeatMap, ...]:
    """Spectrum of each head, and error of mean pooling by layer and k."""
    layers = tuple(f"layer {cell['layer']}" for cell in found.spectra)
    heads = sorted({head["head"] for head in found.heads()})
    ranks = tuple(
        tuple(_mean(row["rank_90"] for row in cell["heads"] if row["head"] == head) for head in heads)
        for cell in found.spectra
    )
    maps = [
        HeatMap(
            title="Singular values that hold 90 % of the energy of an attention matrix",
            x_label="head",
            y_label="layer",
            value_label=f"singular values of {job.length}",
            x=tuple(str(head) for head in heads),
            y=layers,
            values=ranks,
            note=f"Mean over {job.spectrum_documents} held-out document(s). Uniform attention has 1.",
        )
    ]
    for name in POOLED:
        if name not in job.projections:
            continue
        columns = [found.method_errors("linformer", name, k) for k in _shorter(job)]
        flat = found.method_errors("uniform")
        values = tuple((flat[i], *(column[i] for column in columns)) for i in range(len(layers)))
        maps.append(
            HeatMap(
                title=f"Relative error of linformer, {name}, by layer and k",
                x_label="k",
                y_label="layer",
                value_label="relative error",
                x=("uniform", *(str(k) for k in _shorter(job))),
                y=layers,
                values=values,
                note="Held-out documents.",
            )
        )
    return tuple(maps)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _line(name: str, x: Sequence[int], values: Sequence[Sequence[float]], is_baseline: bool = False) -> Line:
    """Median with the smallest and the largest of each group of values."""
    return Line(
        name,
        tuple(map(float, x)),
        tuple(middle(v) for v in values),
        tuple(min(v, default=None) for v in values),
        tuple(max(v, default=None) for v in values),
        is_baseline,
    )


def _flat(name: str, x: Sequence[int], values: Sequence[float], is_baseline: bool) -> Line:
    return _line(name, x, [values] * len(x), is_baseline)


def _timed(
    name: str, x: Sequence[int], cells: Sequence[Config], subjects: Sequence[str], is_baseline: bool = False
) -> Line:
    y, low, high = (
        tuple(latency(cell, subject, field) for cell, subject in zip(cells, subjects, strict=True))
        for field in ("latency_ms", "latency_ms_low", "latency_ms_high")
    )
    return Line(name, tuple(map(float, x)), y, low, high, is_baseline)
