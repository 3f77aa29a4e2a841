"""What the projection study found, in sentences made from its figures."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

from ..latencies import EXACT, latency
from .cells import POOLED, linformer_name
from .views import Measurements, middle, reference_len

if TYPE_CHECKING:
    from . import ProjectionStudy

_TOLERANCES = (0.5, 0.1)


def findings_of(job: ProjectionStudy, found: Measurements) -> tuple[str, ...]:
    """The answer, what the spectra say, what fitting adds, time, training."""
    sentences = [_answer(job, found), _spectra(job, found), _fits(job, found), _time(job, found), _training(job, found)]
    return tuple(sentence for sentence in sentences if sentence)


def _answer(job: ProjectionStudy, found: Measurements) -> str:
    """Error of the best pooled mode over k, the k it takes, and what has no k."""
    modes = [name for name in POOLED if name in job.projections]
    free = ", ".join(
        f"{name} {_number(middle(found.method_errors(name)))}"
        for name in ("revisited_linformer", "efficient", "uniform")
    )
    if not modes:
        return f"On real attention (median of {len(job.layers)} layers) without a k: {free}."
    least, most = job.real_lens[0], max([k for k in job.real_lens if k < job.length], default=job.real_lens[0])
    best = min(modes, key=lambda name: middle(found.method_errors("linformer", name, reference_len(job))) or 0.0)
    needed: list[str] = []
    for tolerance in _TOLERANCES:
        enough = [k for k in job.real_lens if (middle(found.method_errors("linformer", best, k)) or 0.0) <= tolerance]
        least_k = "is not reached" if not enough else f"takes k = {enough[0]}"
        whole = f", which is all {job.length} keys" if enough and enough[0] == job.length else ""
        needed.append(f"{tolerance:g} {least_k}{whole}")
    errors = [_number(middle(found.method_errors("linformer", best, k))) for k in (least, most)]
    return (
        f"On real attention of {job.length} tokens (median of {len(job.layers)} layers) pooled Linformer at its best, "
        f"{best}, has relative error {errors[0]} with k = {least} and {errors[1]} with k = {most}; of the measured k, "
        f"an error of {' and of '.join(needed)}. Without a k: {free}."
    )


def _spectra(job: ProjectionStudy, found: Measurements) -> str:
    heads, k = found.heads(), reference_len(job)
    parts = [
        f"{share} % of the energy in {statistics.median(ranks):g} singular values (median head; at most {max(ranks)})"
        for share in (90, 99)
        if (ranks := [head[f"rank_{share}"] for head in heads])
    ]
    pooled = middle(found.method_errors("linformer", "mean-pool", k))
    cut = middle(found.cut_errors(k))
    compared = "" if pooled is None else f", mean pooling to {k} slots leaves {_number(pooled)}"
    return (
        f"Attention matrices of {job.length} tokens hold {' and '.join(parts)}; cut at rank {k} they leave an error of "
        f"{_number(cut)} in the output{compared}."
    )


def _fits(job: ProjectionStudy, found: Measurements) -> str:
    """Best mode of sharing at each fitted k, beside mean pooling and its own error on the calibration documents."""
    if not found.fits:
        return ""
    parts: list[str] = []
    for k in job.fitted_lens:
        errors = {s: middle(found.fit_errors(s, k)) for s in job.sharings}
        known = {s: e for s, e in errors.items() if e is not None}
        if not known:
            continue
        best = min(known, key=known.__getitem__)
        inside = _number(middle(found.fit_errors(best, k, "calibration")))
        pooled = middle(found.method_errors("linformer", "mean-pool", k))
        beside = "" if pooled is None else f" ({_number(pooled)} by mean pooling)"
        parts.append(f"k = {k}: {_number(known[best])}{beside}, sharing {best}, {inside} on the calibration documents")
    return f"Learned projections fitted to each layer's output, on held-out documents at best: {'; '.join(parts)}."


def _time(job: ProjectionStudy, found: Measurements) -> str:
    cell = next((c for c in reversed(found.timed) if latency(c, EXACT) is not None), None)
    if cell is None:
        return ""
    exact = latency(cell, EXACT) or 0.0
    parts: list[str] = []
    for name in job.projections:
        latencies = [(k, latency(cell, linformer_name(name, k)) or exact) for k in job.proj_lens]
        faster = [k for k, _ in itertools.takewhile(lambda item: item[1] < exact, latencies)]
        parts.append(f"{name} up to k = {faster[-1]}" if faster else f"{name} at no k")
    free = [
        f"{exact / ms:.2g} times as long as {name}"
        for name in ("revisited_linformer", "efficient")
        if (ms := latency(cell, name)) is not None
    ]
    return (
        f"Faster than fused softmax at {cell['length']} tokens, as measured here ({job.num_heads} heads of width "
        f"{job.head_dim}): {', '.join(parts)}. Softmax takes {' and '.join(free)}."
    )


def _training(job: ProjectionStudy, found: Measurements) -> str:
    def mean(method: str, projection: str | None = None, sharing: str | None = None, k: int | None = None) -> str:
        values = found.accuracies(method, projection, sharing, k)
        return "n/a" if not values else f"{statistics.fmean(values):.3f}"

    parts = [f"softmax {mean('softmax')}"]
    if "learned" in job.projections and "headwise" in job.trained_sharings:
        lens = [f"{mean('linformer', 'learned', 'headwise', k)} (k = {k})" for k in job.trained_lens]
        parts.append(f"learned Linformer {', '.join(lens)}")
    if "mean-pool" in job.projections:
        lens = [f"{mean('linformer', 'mean-pool', None, k)} (k = {k})" for k in job.trained_lens]
        parts.append(f"mean-pooled {', '.join(lens)}")
    parts += [f"{name} {mean(name)}" for name in ("revisited_linformer", "efficient")]
    spread = [max(v) - min(v) for v in _by_kind(found) if len(v) > 1]
    noise = f"; seeds of one kind differ by up to {max(spread):.3f}" if spread else "; one seed, so no spread is known"
    return (
        f"Held-out accuracy after {job.steps} steps on bytes of source code (majority {found.majority:.3f}, averaging "
        f"the values {mean('mean')}): {'; '.join(parts)}{noise}."
    )


def _by_kind(found: Measurements) -> list[list[float]]:
    kinds = dict.fromkeys((run["method"], run["projection"], run["sharing"], run["k"]) for run in found.runs)
    return [found.accuracies(*kind) for kind in kinds]


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
