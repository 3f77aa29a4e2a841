"""What the study of ppSBN found, in sentences made of its figures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ...records import Config
from .rows import Cells, with_and_without_post, with_pre, without_pre
from .training import SHIFTS

if TYPE_CHECKING:
    from . import PpsbnStudy

_FEWER, _CALMER = 0.05, 2.0  # share of failed runs, and factor of the gradient spike, from which on a change counts


def findings_of(job: PpsbnStudy, errors: Sequence[Config], runs: Cells) -> tuple[str, ...]:
    """Stability first; then accuracy, kinds of statistics and shifts, the second half, errors."""
    return (
        stability(job, runs),
        accuracy(job, runs),
        statistics(job, runs),
        second_half(job, Cells(errors), runs),
        error(job, Cells(errors)),
    )


def stability(job: PpsbnStudy, runs: Cells) -> str:
    """Failed runs and gradient spikes with and without the first half, by learning rate."""
    parts: list[str] = []
    for estimator in job.estimators:
        here = runs.where(estimator=estimator)
        without, with_it = here.where(variant=without_pre()), here.where(variant=with_pre())
        parts.append(
            f"{_effect(job, without, with_it)} with estimator {estimator}: without it {_failed(job, without)}, with it "
            f"{_failed(job, with_it)}"
        )
    rates = " / ".join(f"{lr:g}" for lr in job.learning_rates)
    return (
        f"The first half of ppSBN {'; it '.join(parts)}. Softmax: {_failed(job, runs.where(variant='softmax'))}. (At "
        f"learning rates {rates}. Failed: nothing learned, or a step that was not finite. Spike: the largest gradient "
        "norm of a run over its median one, median over runs.)"
    )


def _effect(job: PpsbnStudy, without: Cells, with_it: Cells) -> str:
    steadier = less_steady = False
    for lr in job.learning_rates:
        failed, spikes = [], []
        for cells in (without.where(learning_rate=lr), with_it.where(learning_rate=lr)):
            failed.append(cells.count("failed") / max(len(cells), 1))
            spikes.append(cells.median("gradient_spike") or 1.0)
        steadier |= failed[0] - failed[1] >= _FEWER or spikes[0] >= _CALMER * spikes[1]
        less_steady |= failed[1] - failed[0] >= _FEWER or spikes[1] >= _CALMER * spikes[0]
    if steadier and less_steady:
        return "works both ways"
    if steadier:
        return "makes training steadier"
    return "makes training less steady" if less_steady else "changes stability little"


def _failed(job: PpsbnStudy, runs: Cells) -> str:
    at = [runs.where(learning_rate=lr) for lr in job.learning_rates]
    failed = " / ".join(str(cells.count("failed")) for cells in at)
    spikes = " / ".join(_number(cells.median("gradient_spike")) for cells in at)
    return f"{failed} of {len(at[0])} runs failed, spikes of {spikes}"


def accuracy(job: PpsbnStudy, runs: Cells) -> str:
    """Gains over the same estimator without ppSBN, by batch size, and over averaging the values."""
    whole = with_pre(post=True)
    sizes = " / ".join(map(str, job.batch_sizes))
    parts: list[str] = []
    for lr in job.learning_rates:
        for estimator in job.estimators:
            here = runs.where(learning_rate=lr, estimator=estimator)
            by_size = [_gain(here.where(batch_size=size), whole, "neither") for size in job.batch_sizes]
            parts.append(f"{' / '.join(by_size)} ({estimator}, rate {lr:g})")
    rates = " / ".join(f"{lr:g}" for lr in job.learning_rates)
    at = [runs.where(learning_rate=lr) for lr in job.learning_rates]
    ppsbn, neither, softmax = (
        " / ".join(_gain(cells, names, "uniform") for cells in at) for names in (whole, ["neither"], ["softmax"])
    )
    averaging = " / ".join(_percent(cells.where(variant="uniform")) for cells in at)
    return (
        f"Against the same estimator without it, ppSBN changes held-out accuracy by {', '.join(parts)} points at batch "
        f"{sizes}. Against averaging the values, at rates {rates}: ppSBN {ppsbn}, no ppSBN {neither}, softmax "
        f"{softmax} points; averaging has {averaging} percent, the majority class {100 * runs.guessing:.1f}."
    )


def _gain(runs: Cells, variants: Sequence[str], over: str) -> str:
    gains = [gain for name in variants for gain in runs.gains(name, over)]
    return f"{100 * fmean(gains):+.1f}" if gains else "n/a"


def statistics(job: PpsbnStudy, runs: Cells) -> str:
    """Batch against token statistics, running ones against the batch's own, and shifted data."""
    sizes = dict.fromkeys((job.batch_sizes[0], job.batch_sizes[-1]))
    parts = [f"{_points(runs.where(batch_size=n).gains('ppSBN, batch', 'ppSBN, token'))} at batch {n}" for n in sizes]
    smallest = runs.where(variant=with_pre(pre="batch"), batch_size=job.batch_sizes[0])
    own = _differences(smallest.accuracies("own_statistics_64"), smallest.accuracies())
    calm = runs.where(learning_rate=job.learning_rates[0])
    groups = {
        "token statistics": with_pre(pre="token"),
        "batch statistics": with_pre(pre="batch"),
        "no first half": without_pre(),
        "softmax": ["softmax"],
    }
    others = [name for name in SHIFTS if name != "scaled"]
    lost = [
        f"{label} {_lost(calm.where(variant=names), others)} / {_lost(calm.where(variant=names), ['scaled'])}"
        for label, names in groups.items()
    ]
    return (
        f"Batch statistics change accuracy against token statistics by {', '.join(parts)}; judged with the statistics "
        f"of held-out batches of 64 instead of the running ones, models trained at batch {job.batch_sizes[0]} change "
        f"by {_points(own)}. Points lost on shifted data ({', '.join(others)}; mean) / with q and k three times as "
        f"long, rate {job.learning_rates[0]:g}: {', '.join(lost)}."
    )


def _lost(runs: Cells, shifts: Sequence[str]) -> str:
    lost = [loss for name in shifts for loss in _differences(runs.accuracies(), runs.accuracies(name))]
    return f"{100 * fmean(lost):.1f}" if lost else "n/a"


def second_half(job: PpsbnStudy, errors: Cells, runs: Cells) -> str:
    """What training makes of gamma and beta, and what a fit to the wanted outputs makes of them."""
    gains = {
        label: [gain for a, b in with_and_without_post() if bool(a.pre) is pre for gain in runs.gains(a.name, b.name)]
        for label, pre in (("where the first half is there", True), ("where it is not", False))
    }
    parts = " and by ".join(f"{_points(values)} {label}" for label, values in gains.items())
    data, place, cells = _main(job, errors)
    here = cells.where(pre="token", fits_temperature=False, estimator=job.estimators[0])
    fitted = " and ".join(
        f"of {what} from {_number(here.median(before))} to {_number(here.median(after))}"
        for what, before, after in (
            ("the output", "total_error", "fitted_error"),
            ("the mean of v", "uniform_error", "fitted_uniform_error"),
        )
    )
    return (
        f"The second half changes accuracy by {parts}. With gamma and beta fitted to softmax outputs ({data} data, "
        f"{place}, {job.estimators[0]}, token statistics) it brings the error {fitted}."
    )


def error(job: PpsbnStudy, errors: Cells) -> str:
    """What normalising saves the estimator, and what it costs against softmax attention."""
    data, place, cells = _main(job, errors)
    parts: list[str] = []
    for estimator in job.estimators:
        here = cells.where(estimator=estimator)
        raw = here.where(pre=False)
        token, fitted = (here.where(pre="token", fits_temperature=fits) for fits in (False, True))
        parts.append(
            f"{estimator} {_number(raw.median('total_error'))} without the first half "
            f"({100 * (raw.median('negative_share') or 0.0):.0f} % of the denominators negative), "
            f"{_number(token.median('total_error'))} with it ({_number(token.median('estimator_error'))} against its "
            f"own kernel attention), {_number(fitted.median('total_error'))} with its temperature fitted"
        )
    token = cells.where(pre="token", fits_temperature=False)
    return (
        f"Error against softmax attention of raw q and k ({data} data, {place}): {'; '.join(parts)}; the mean of v "
        f"{_number(cells.median('uniform_error'))}. What the first half leaves at temperature 1 is "
        f"{_number(token.median('uniform_to_kernel_error'))} away from averaging."
    )


def _main(job: PpsbnStudy, errors: Cells) -> tuple[str, str, Cells]:
    """The data that sentences speak of: real ones if measured, otherwise those of the largest radius."""
    if "real" in job.data:
        return "real", f"median of {len(job.layers)} layers", errors.where(data="real")
    radius = job.radii[-1]
    return job.data[0], f"radius {radius:g}", errors.where(data=job.data[0], radius=radius)


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _percent(runs: Cells) -> str:
    found = runs.accuracy()
    return "n/a" if found is None else f"{100 * found:.1f}"


def _points(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    mean, low, high = (100 * measure(values) for measure in (fmean, min, max))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
