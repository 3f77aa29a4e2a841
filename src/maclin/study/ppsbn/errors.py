"""Errors of the study of ppSBN: of the estimate, of what normalising q and k changes, and of both together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

import torch
from torch import Tensor

from ...core.reference import softmax_attention
from ...core.statistics import guarded
from ...records import Config
from ..data import Problem
from .variants import Pre, fitted_post, macformer


@torch.no_grad()
def errors(
    pre: Pre,
    fits_temperature: bool,
    estimator: str,
    num_features: int,
    judged: Problem,
    calibration: Problem,
    seeds: Iterable[int],
) -> Config:
    """Relative errors of attention outputs with kernel exp, medians over draws of the features.

    The mechanism is calibrated as for a conversion: batch statistics, temperature and, for an estimator that chooses
    its features by data, these. The second half of ppSBN is left out but where it is named. Without the first half
    exact kernel attention is softmax attention itself, and normalising changes nothing.

    Args:
        pre: the first half of ppSBN, or False.
        fits_temperature: whether the normalised logits are brought to the size of the raw ones; otherwise
            temperature is 1.
        estimator: of macformer.
        num_features: M.
        judged: what errors are measured on.
        calibration: other data of the same kind.
        seeds: of the draws.

    Returns:
        estimator_error (of the output against exact kernel attention on the same normalised q and k; _low and _high
        over draws), uniform_to_kernel_error (of the mean of v against the same), normalisation_error (of exact kernel
        attention against softmax attention of the raw q and k), total_error (of the output against that, _low and
        _high), uniform_error, fitted_error and fitted_uniform_error (both after the second half with gamma and beta
        fitted on ``calibration``), negative_share and guarded_share (of the denominators), temperature (mean over
        heads). None where a figure is not finite.
    """
    q, k, v, scale = judged.q, judged.k, judged.v, judged.scale
    exact = softmax_attention(q, k, v, scale=scale)
    other = (calibration.q, calibration.k, calibration.v)
    exact_other = softmax_attention(*other, scale=scale)
    uniform, uniform_other = _uniform(v, exact), _uniform(calibration.v, exact_other)
    by_draw: dict[str, list[float]] = {}
    rows = negative = small = 0
    for seed in seeds:
        made = macformer(
            pre,
            estimator,
            judged.head_dim,
            judged.num_heads,
            num_features,
            learns_temperature=fits_temperature,
            generator=torch.Generator().manual_seed(seed),
        )
        made.post = None
        made = made.calibrated(*other, scale=scale).eval()
        with guarded() as counts:
            out = made(q, k, v, scale=scale)
        rows, negative, small = rows + counts.rows, negative + counts.negative, small + counts.guarded
        kernel = softmax_attention(*made.normalised(q.double(), k.double(), scale), v, scale=scale)
        post = fitted_post(made(*other, scale=scale), exact_other)
        temperature = made.temperature(scale)
        for name, value in {
            "estimator_error": relative_error(out, kernel),
            "uniform_to_kernel_error": relative_error(uniform, kernel),
            "normalisation_error": relative_error(kernel, exact),
            "total_error": relative_error(out, exact),
            "fitted_error": relative_error(post(out.double()), exact),
            "temperature": 1.0 if temperature is None else temperature.mean().item(),
        }.items():
            by_draw.setdefault(name, []).append(value)
    figures = {name: median(values) for name, values in by_draw.items()}
    for name in ("estimator_error", "total_error"):
        figures[f"{name}_low"], figures[f"{name}_high"] = min(by_draw[name]), max(by_draw[name])
    figures["uniform_error"] = relative_error(uniform, exact)
    figures["fitted_uniform_error"] = relative_error(fitted_post(uniform_other, exact_other)(uniform), exact)
    figures["negative_share"], figures["guarded_share"] = negative / max(rows, 1), small / max(rows, 1)
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """||out - wanted||_F / ||wanted||_F; infinite where out holds NaN or infinity."""
    if not bool(out.isfinite().all()):
        return math.inf
    return ((out.double() - wanted).norm() / wanted.norm()).item()


def _uniform(v: Tensor, like: Tensor) -> Tensor:
    return v.double().mean(2, keepdim=True).expand_as(like)
