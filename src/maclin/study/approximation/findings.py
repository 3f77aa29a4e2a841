"""What the approximation study found, in sentences made from its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...bench import break_even, growth_exponent
from ...records import Config, Timing
from ..latencies import EXACT, latency
from .cells import REAL_LENGTH, TAYLOR, UNIFORM, macformer_name, subject_name
from .views import Measured, length_for

if TYPE_CHECKING:
    from . import ApproximationStudy

_LESS = 0.99**2
"""Ratio of normalised mean-square errors from which on one method is called nearer: 1 % of the relative error."""


def findings_of(job: ApproximationStudy, cells: Sequence[Config], timed: Sequence[Config]) -> tuple[str, ...]:
    """The answer, how often each estimator beats its baselines, how the error falls, kernels, time."""
    found = Measured(cells)
    sentences = [_answer(job, found), _wins(job, found), _rates(job, found), _kernels(job, found), _time(job, timed)]
    return tuple(sentence for sentence in sentences if sentence)


def _answer(job: ApproximationStudy, found: Measured) -> str:
    """Relative errors of the first kernel on the first data, scale by scale."""
    data, kernel, m = job.data[0], job.kernels[0], job.reference_features
    length = length_for(job, data)
    named = [*((macformer_name(estimator), m) for estimator in job.estimators), (UNIFORM, 0), (TAYLOR, 0)]
    parts = [
        f"at |t| <= {scale:g} "
        + ", ".join(f"{name} {_rel(found.nmse(data, scale, kernel, name, num, length))}" for name, num in named)
        for scale in job.scales
    ]
    return (
        f"Relative error at {length} tokens with {m} features (kernel {kernel}, {data} data): {'; '.join(parts)}. "
        f"{UNIFORM} averages the values, {TAYLOR} is the first-order expansion with D + 1 features."
    )


def _wins(job: ApproximationStudy, found: Measured) -> str:
    """In how many settings each estimator is nearer to its kernel than the baselines."""
    parts = [_wins_of(job, found, macformer_name(estimator)) for estimator in job.estimators]
    return (
        "Settings of kernel, scale, length and features in which an estimator is nearer to its kernel by at least 1 %: "
        f"{'; '.join(parts)}."
    )


def _wins_of(job: ApproximationStudy, found: Measured, name: str) -> str:
    over_uniform: list[str] = []
    over_taylor: list[str] = []
    for data in job.data:
        pairs = [
            [
                found.nmse(data, scale, kernel, other, num, length)
                for other, num in ((name, m), (UNIFORM, 0), (TAYLOR, 0))
            ]
            for scale in job.scales
            for kernel in job.kernels
            for length in ((REAL_LENGTH,) if data == "real" else job.lengths)
            for m in job.features
        ]
        known = [
            (own, flat, linear)
            for own, flat, linear in pairs
            if own is not None and flat is not None and linear is not None
        ]
        if known:
            over_uniform.append(f"{sum(own < _LESS * flat for own, flat, _ in known)} of {len(known)} ({data})")
            over_taylor.append(f"{sum(own < _LESS * linear for own, _, linear in known)} ({data})")
    if not over_uniform:
        return f"{name} could not be built with any of these numbers of features"
    return f"{name} than {UNIFORM} in {', '.join(over_uniform)} and than {TAYLOR} in {', '.join(over_taylor)}"


def _rates(job: ApproximationStudy, found: Measured) -> str:
    """Exponents of the normalised mean-square error in M and in the length."""
    data, scale, kernel = job.data[0], max(job.scales), job.kernels[0]
    length = length_for(job, data)
    parts: list[str] = []
    for estimator in job.estimators:
        name = macformer_name(estimator)
        by_m = {m: found.nmse(data, scale, kernel, name, m, length) for m in job.features}
        by_n = {n: found.nmse(data, scale, kernel, name, job.reference_features, n) for n in job.lengths}
        in_m, in_n = _exponent(by_m), _exponent(by_n)
        words = [f"M^{in_m:.2f}"] if in_m is not None else []
        words += [f"N^{in_n:.2f}"] if in_n is not None else []
        if words:
            parts.append(f"{name} {' and '.join(words)}")
    if not parts:
        return ""
    return (
        f"Fitted growth of the normalised mean-square error with features M and length N (kernel {kernel}, {data} "
        f"data, |t| <= {scale:g}): {'; '.join(parts)}. Independent random features would give M^-1.00."
    )


def _exponent(values: dict[int, float | None]) -> float | None:
    points = [(x, y) for x, y in values.items() if y is not None and y > 0]
    return None if len(points) < 2 else growth_exponent([x for x, _ in points], [y for _, y in points])


def _kernels(job: ApproximationStudy, found: Measured) -> str:
    """How much the choice of the kernel changes, per scale, for the first estimator and against softmax."""
    if len(job.kernels) < 2:
        return ""
    data, m = job.data[0], job.reference_features
    length, name = length_for(job, data), macformer_name(job.estimators[0])
    parts: list[str] = []
    for scale in job.scales:
        own = {k: found.nmse(data, scale, k, name, m, length) for k in job.kernels}
        known = {k: math.sqrt(x) for k, x in own.items() if x is not None}
        distance = {k: found.nmse(data, scale, k, EXACT, 0, length) for k in job.kernels}
        far = {k: math.sqrt(x) for k, x in distance.items() if x is not None}
        if not known or not far:
            continue
        least, most, farthest = min(known, key=known.__getitem__), max(known, key=known.__getitem__), max(
            far, key=far.__getitem__
        )  # fmt: skip
        parts.append(
            f"at |t| <= {scale:g} the relative error runs from {known[least]:.3g} ({least}) to {known[most]:.3g} "
            f"({most}), and exact softmax is at most {far[farthest]:.3g} away from a kernel ({farthest})"
        )
    return f"Kernels, {name} with {m} features, {data} data, {length} tokens: {'; '.join(parts)}." if parts else ""


def _time(job: ApproximationStudy, timed: Sequence[Config]) -> str:
    m = job.reference_features
    rows = [
        Timing(name, "attention", cell["length"], latency(cell, subject_name(method, num)))
        for cell in timed
        for name, method, num in [
            ("softmax", EXACT, 0),
            *((macformer_name(estimator), macformer_name(estimator), m) for estimator in job.estimators),
        ]
    ]
    parts: list[str] = []
    for row in break_even(rows, "attention"):
        where = f"from {row.length} tokens on" if row.length is not None else f"never ({row.note})"
        parts.append(f"{row.subject} {where}")
    return (
        f"Faster than fused softmax with {m} features and one head of width {job.head_dim}, as measured here: "
        f"{', '.join(parts)}."
    )


def _rel(nmse: float | None) -> str:
    return "n/a" if nmse is None else f"{math.sqrt(nmse):.3g}"
