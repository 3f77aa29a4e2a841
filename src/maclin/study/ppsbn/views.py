"""Tables, charts and heat maps of the study of ppSBN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ...records import Cell, Config, HeatMap, Line, LineChart, StudyTable
from .rows import Cells, Subject, subjects
from .training import CURVE, OWN_BATCHES, SHIFTS
from .variants import BASELINES, VARIANTS

if TYPE_CHECKING:
    from . import PpsbnStudy

_FIRST_HALVES = {
    (False, False): "no first half",
    ("token", False): "token",
    ("token", True): "token, temperature fitted",
    ("batch", False): "batch",
    ("batch", True): "batch, temperature fitted",
}
_RADIUS, _ERROR = "largest |q||k| / sqrt(D)", "relative error of the output"
_SPREAD = "Mean over seeds, smallest and largest in brackets."


def tables_of(job: PpsbnStudy, errors: Sequence[Config], runs: Cells) -> tuple[StudyTable, ...]:
    """Errors first, then accuracy and stability of training, then shifted data."""
    found = [_error_table(job, Cells(errors))] if "real" in job.data else []
    found += [_accuracy_table(job, runs, lr) for lr in job.learning_rates]
    return (*found, _stability_table(job, runs), _shift_table(job, runs), _statistics_table(job, runs))


def charts_of(job: PpsbnStudy, errors: Sequence[Config], runs: Cells) -> tuple[LineChart, ...]:
    """Errors over the radius; accuracy over batch sizes; losses over training."""
    found = [
        chart(job, Cells(errors).where(data=data, estimator=estimator), f"{data} data, estimator {estimator}")
        for chart in (_total_chart, _estimator_chart)
        for data in job.data
        if data != "real"
        for estimator in job.estimators
    ]
    for estimator in job.estimators:
        found += [_accuracy_chart(job, runs, lr, estimator) for lr in job.learning_rates]
        found.append(_loss_chart(job, runs, estimator))
    return tuple(found)


def heat_maps_of(job: PpsbnStudy, runs: Cells) -> tuple[HeatMap, ...]:
    """Gradient spikes of every kind of run."""
    rows = subjects(job.estimators)
    columns = [(lr, size) for lr in job.learning_rates for size in job.batch_sizes]
    values: list[tuple[float | None, ...]] = []
    for subject in rows:
        spikes = [
            runs.of(subject).where(learning_rate=lr, batch_size=size).median("gradient_spike") for lr, size in columns
        ]
        values.append(tuple(None if spike is None else math.log10(spike) for spike in spikes))
    return (
        HeatMap(
            "Gradient spikes in training",
            "batch size, learning rate",
            "attention",
            "log10 of the largest norm over the median",
            tuple(f"{size}, {lr:g}" for lr, size in columns),
            tuple(subject.label for subject in rows),
            tuple(values),
            "Largest norm of a gradient in a run over the median norm of the run; median over seeds. Gradients are not "
            "clipped.",
        ),
    )


def _error_table(job: PpsbnStudy, errors: Cells) -> StudyTable:
    figures = {
        "estimator_error": "estimate: against its kernel attention",
        "uniform_to_kernel_error": "baseline: uniform against the same",
        "normalisation_error": "normalising: kernel attention against softmax",
        "total_error": "both: output against softmax",
        "uniform_error": "baseline: uniform against softmax",
        "fitted_error": "both, second half fitted",
        "fitted_uniform_error": "baseline: uniform, second half fitted",
        "negative_share": "share of negative denominators",
        "guarded_share": "share of guarded denominators",
        "temperature": "temperature",
    }
    rows: list[tuple[Cell, ...]] = []
    for estimator in job.estimators:
        for (pre, fits), name in _FIRST_HALVES.items():
            cells = errors.where(data="real", estimator=estimator, pre=pre, fits_temperature=fits)
            rows.append((estimator, name, *(cells.median(figure) for figure in figures)))
    return StudyTable(
        f"Relative error of the attention output on real q, k, v: medians over {len(job.layers)} layers",
        ("estimator", "first half", *figures.values()),
        tuple(rows),
        f"Kernel exp, M = {job.error_features}; without the first half kernel attention is softmax attention. Uniform "
        "is the mean of v. Statistics, temperature, gamma and beta are fitted on other documents.",
    )


def _total_chart(job: PpsbnStudy, errors: Cells, where: str) -> LineChart:
    uniform = tuple(errors.where(radius=radius).median("uniform_error") for radius in job.radii)
    return LineChart(
        f"Error against softmax attention of raw q and k, {where}",
        _RADIUS,
        _ERROR,
        (*_error_lines(job, errors, "total_error"), Line("uniform", job.radii, uniform, is_baseline=True)),
        log_x=True,
        log_y=True,
        note=f"M = {job.error_features}; spread over draws of the features.",
    )


def _estimator_chart(job: PpsbnStudy, errors: Cells, where: str) -> LineChart:
    baselines: list[Line] = []
    for pre, fits in ((False, False), ("token", False)):
        cells = errors.where(pre=pre, fits_temperature=fits)
        y = tuple(cells.where(radius=radius).median("uniform_to_kernel_error") for radius in job.radii)
        baselines.append(Line(f"uniform, {_FIRST_HALVES[pre, fits]}", job.radii, y, is_baseline=True))
    return LineChart(
        f"Error against exact kernel attention on the same q and k, {where}",
        _RADIUS,
        _ERROR,
        (*_error_lines(job, errors, "estimator_error"), *baselines),
        log_x=True,
        log_y=True,
        note="Each line is held against what its own first half leaves, so that lines say nothing of what it loses. "
        f"M = {job.error_features}; spread over draws of the features.",
    )


def _error_lines(job: PpsbnStudy, errors: Cells, figure: str) -> list[Line]:
    lines: list[Line] = []
    for (pre, fits), name in _FIRST_HALVES.items():
        cells = errors.where(pre=pre, fits_temperature=fits)
        at = [cells.where(radius=radius) for radius in job.radii]
        y, low, high = (tuple(found.median(figure + end) for found in at) for end in ("", "_low", "_high"))
        lines.append(Line(name, job.radii, y, low, high))
    return lines


def _accuracy_table(job: PpsbnStudy, runs: Cells, lr: float) -> StudyTable:
    rows: list[tuple[Cell, ...]] = [("majority class", *(_percent([runs.guessing]) for _ in job.batch_sizes))]
    for subject in subjects(job.estimators):
        here = runs.of(subject).where(learning_rate=lr)
        rows.append((subject.label, *(_percent(here.where(batch_size=size).accuracies()) for size in job.batch_sizes)))
    return StudyTable(
        f"Held-out accuracy in percent, learning rate {lr:g}",
        ("", *(f"batch {size}" for size in job.batch_sizes)),
        tuple(rows),
        f"{_SPREAD} {job.num_examples} examples in every run, so that small batches take more steps.",
    )


def _stability_table(job: PpsbnStudy, runs: Cells) -> StudyTable:
    rows: list[tuple[Cell, ...]] = []
    for subject in subjects(job.estimators):
        for lr in job.learning_rates:
            here = runs.of(subject).where(learning_rate=lr)
            rows.append(
                (
                    subject.label,
                    lr,
                    f"{here.count('failed')} of {len(here)}",
                    f"{here.count('num_nonfinite_steps')} of {len(here)}",
                    here.median("final_loss"),
                    here.largest("worst_loss"),
                    here.median("gradient_p99"),
                    here.median("gradient_spike"),
                    here.largest("gradient_spike"),
                )
            )
    return StudyTable(
        "Stability of training, all batch sizes and seeds",
        (
            "",
            "learning rate",
            "runs that failed",
            "runs with a step that was not finite",
            "final loss, median",
            "worst loss of a step",
            "gradient norm, 99th percentile over median",
            "gradient norm, largest over median",
            "the same, worst run",
        ),
        tuple(rows),
        "Failed: a step was not finite, or the final loss is at least 0.95 of that of guessing. Gradients are not "
        "clipped.",
    )


def _shift_table(job: PpsbnStudy, runs: Cells) -> StudyTable:
    lr = job.learning_rates[0]
    rows: list[tuple[Cell, ...]] = []
    for subject in subjects(job.estimators):
        here = runs.of(subject).where(learning_rate=lr)
        rows.append((subject.label, *(_percent(here.accuracies(name)) for name in ("accuracy", *SHIFTS))))
    return StudyTable(
        f"Accuracy in percent where evaluation differs from training, learning rate {lr:g}",
        ("", "as in training", *SHIFTS),
        tuple(rows),
        "Mean over seeds and batch sizes, smallest and largest in brackets. "
        + "; ".join(f"{name}: {text}" for name, text in SHIFTS.items())
        + f". The majority class has {100 * runs.guessing:.1f}.",
    )


def _statistics_table(job: PpsbnStudy, runs: Cells) -> StudyTable:
    rows: list[tuple[Cell, ...]] = []
    own = [f"own_statistics_{size}" for size in OWN_BATCHES]
    batch = [Subject(v.name, estimator) for estimator in job.estimators for v in VARIANTS if v.pre == "batch"]
    for subject in batch:
        for lr in job.learning_rates:
            for size in job.batch_sizes:
                here = runs.of(subject).where(learning_rate=lr, batch_size=size)
                found = (_percent(here.accuracies(name)) for name in ("accuracy", *own))
                token = runs.where(
                    variant=subject.variant.replace("batch", "token"), estimator=subject.estimator, learning_rate=lr
                )
                uniform = runs.of(Subject("uniform")).where(learning_rate=lr, batch_size=size)
                rows.append(
                    (
                        subject.label,
                        lr,
                        size,
                        *found,
                        _percent(token.where(batch_size=size).accuracies()),
                        _percent(uniform.accuracies()),
                    )
                )
    return StudyTable(
        "Batch statistics: accuracy in percent with the running ones and with those of the held-out batch",
        (
            "",
            "learning rate",
            "batch in training",
            "running statistics",
            *(f"own, batch {size}" for size in OWN_BATCHES),
            "token statistics instead",
            "baseline: uniform",
        ),
        tuple(rows),
        f"{_SPREAD} Running statistics are those of the training batches, averaged with momentum 0.1.",
    )


def _accuracy_chart(job: PpsbnStudy, runs: Cells, lr: float, estimator: str) -> LineChart:
    x = tuple(map(float, job.batch_sizes))
    lines: list[Line] = []
    for subject in subjects([estimator]):
        here = runs.of(subject).where(learning_rate=lr)
        found = [here.where(batch_size=size).accuracies() for size in job.batch_sizes]
        lines.append(
            Line(
                subject.variant,
                x,
                *(tuple(measure(values) if values else None for values in found) for measure in (fmean, min, max)),
                is_baseline=subject.variant in BASELINES,
            )
        )
    lines.append(Line("majority class", x, (runs.guessing,) * len(x), is_baseline=True))
    return LineChart(
        f"Held-out accuracy over batch sizes, estimator {estimator}, learning rate {lr:g}",
        "batch size",
        "accuracy",
        tuple(lines),
        log_x=True,
        note="Mean over seeds; spread from the smallest to the largest.",
    )


def _loss_chart(job: PpsbnStudy, runs: Cells, estimator: str) -> LineChart:
    lr, size = job.learning_rates[-1], job.batch_sizes[0]
    lines: list[Line] = []
    for subject in subjects([estimator]):
        curves = [cell["losses"] for cell in runs.of(subject).where(learning_rate=lr, batch_size=size).cells]
        points = max((len(curve) for curve in curves), default=0)
        at = [[curve[i] for curve in curves if i < len(curve)] for i in range(points)]
        means, lows, highs = (tuple(measure(values) for values in at) for measure in (fmean, min, max))
        x = tuple((i + 1) / min(CURVE, job.num_examples // size) for i in range(points))
        lines.append(Line(subject.variant, x, means, lows, highs, subject.variant in BASELINES))
    return LineChart(
        f"Training loss, estimator {estimator}, batch {size}, learning rate {lr:g}",
        "share of the training",
        "cross-entropy",
        tuple(lines),
        note="Mean over steps and seeds, spread from the smallest to the largest seed. Runs that broke off end there.",
    )


def _percent(values: Sequence[float]) -> Cell:
    if not values:
        return None
    mean, low, high = (100 * measure(values) for measure in (fmean, min, max))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"
