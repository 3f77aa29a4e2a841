"""From q, k and v to a feature map: how many features, which, and what error to expect of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .confidence import CONFIDENCE
from .design import Document, basis_of, spread_evenly
from .kernels import Kernel
from .maps import MaclaurinMap
from .prediction import OutputMoments, predicted_rel_error
from .reference import softmax_attention
from .selection import Selection
from .stratified import Layer, Strata
from .stratified_map import FLOOR, StratifiedMap
from .unbiased import counts_of

FEATURES_PER_AXIS = 16
"""Largest number of features that "auto" tries, over the width of a head: the affordable number."""

MOST_PAID = 1.25
"""Largest price of being sure: the number of features over the one that the calibration data themselves ask for."""

_FITTED_ROWS, _FITTED_SEQUENCES = 128, 16  # that a temperature is fitted to
_COUNTED = 8  # degrees whose variance is measured; those above are extrapolated


@dataclass(frozen=True)
class Calibration:
    """What ``maclin.calibrate`` chose, and what it expects of it.

    Attributes:
        num_features: M that is used.
        counts: of them, per degree.
        rel_error: relative error of the layer's attention output against exact kernel attention on sequences that had
            no say: a third that was held back, with num_features="auto" each in turn; for random features the one
            that is predicted.
        rel_error_by_head: the same per key head.
        highest: per key head, the highest degree that is used; -1 is plain averaging, where any degree would harm.
        radius: per key head, largest |x - c_q| times largest |y - c_k|, temperature and scale included.
        tolerance: what was asked for with num_features="auto", otherwise None.
        bound: of rel_error on as many other documents of the same kind, as sure as ``confidence`` says; None for
            random features.
        least: with a tolerance, the number of features from which on rel_error is within it, without the margin of
            the bound; None where no number is.
        reached: whether the bound is within the tolerance, and num_features at most 1.25 times ``least``: beyond, the
            data do not say which number it takes. None without a tolerance.
        note: what is worth saying, one sentence each.
        kernels: with kernel="auto", per kernel its relative error against softmax attention, the best first.
        temperature: per query head, where it is learned: what was fitted to the logits.
    """

    num_features: int
    counts: tuple[int, ...]
    rel_error: float
    rel_error_by_head: tuple[float, ...]
    highest: tuple[int, ...]
    radius: tuple[float, ...]
    tolerance: float | None = None
    reached: bool | None = None
    note: tuple[str, ...] = ()
    kernels: tuple[tuple[str, float], ...] = ()
    temperature: tuple[float, ...] = ()
    bound: float | None = None
    least: int | None = None


def calibrate_exact(
    docs: Sequence[Sequence[Document]],
    kernel: Kernel,
    scale: float,
    *,
    num_features: int | Literal["auto"],
    tolerance: float | None,
    counts: Sequence[int] | None,
    confidence: float = CONFIDENCE,
) -> tuple[StratifiedMap, Calibration]:
    """The stratified map that serves these documents best, one list of them per key head."""
    head_dim = docs[0][0].y.shape[1]
    floor = FLOOR if kernel.is_exponential else 0.0
    least: int | None = None
    if num_features == "auto":
        assert tolerance is not None
        found = Selection(docs, kernel, FEATURES_PER_AXIS * head_dim, floor, confidence).within(tolerance, head_dim + 1)
        strata, least = found.strata, found.least
    else:
        layer = Layer(docs, kernel, num_features, floor, counts or ())
        strata = layer.best(num_features) if counts is None else layer.strata(counts)
    made = StratifiedMap(kernel, head_dim, len(docs), strata.counts, centred=kernel.is_exponential)
    made.set_(strata, scale)
    radius = tuple(_radius(head, strata, i) for i, head in enumerate(docs))
    assert strata.rel_error is not None
    assert strata.bound is not None
    used = sum(strata.counts)
    if tolerance is None:
        reached, notes = None, _of_number(strata, num_features if counts is None else used)
    else:
        reached = strata.bound <= tolerance and least is not None and used <= MOST_PAID * least
        notes = (
            () if reached else (_why_not(strata, tolerance, least, confidence, FEATURES_PER_AXIS * head_dim, radius),)
        )
    return made, Calibration(
        used,
        strata.counts,
        strata.rel_error,
        strata.rel_errors,
        strata.highest,
        radius,
        tolerance,
        reached,
        (*notes, *_of_heads(strata, radius)),
        bound=strata.bound,
        least=least,
    )


def _why_not(
    strata: Strata, tolerance: float, least: int | None, confidence: float, most: int, radius: Sequence[float]
) -> str:
    if least is None:
        return (
            f"no number of features up to {most} brings the error to {tolerance:g}: it stays at "
            f"{strata.rel_error:.2g}, and up to {strata.bound:.2g} on other sequences, because the radius is "
            f"{max(radius):.2g}; keep this layer exact or take another mechanism"
        )
    number = sum(strata.counts)
    settled = strata.bound is not None and strata.bound <= tolerance
    return (
        f"{least} features bring the error of these sequences to {tolerance:g}, but to be {100 * confidence:g} % sure "
        f"of as many others takes "
        + (f"{number}" if settled else f"more than {most} (their error may be {strata.bound:.2g})")
        + "; calibrate on more sequences or pass a lower confidence"
        + (f", or take them with num_features={number}" if settled else "")
    )


def _of_number(strata: Strata, num_features: int | Literal["auto"]) -> tuple[str, ...]:
    used = sum(strata.counts)
    if num_features == "auto" or len(strata.counts) > 2 or used >= num_features:
        return ()
    return (
        f"uses the {used} features of degrees 0 and 1 out of {num_features}: more would bring the error down by "
        "less than 5 %",
    )


def _of_heads(strata: Strata, radius: Sequence[float]) -> tuple[str, ...]:
    average = [i for i, degree in enumerate(strata.highest) if degree < 1]
    if not average:
        return ()
    return (
        f"key heads {average}: every degree beyond averaging harms (radius {max(radius[i] for i in average):.2g}), "
        "so they average the values",
    )


def calibrate_unbiased(
    docs: Sequence[Sequence[Document]],
    kernel: Kernel,
    scale: float,
    num_features: int,
    generator: torch.Generator | None = None,
) -> tuple[StratifiedMap, Calibration]:
    """The unbiased map whose counts leave the least variance on these documents; None draws from torch's generator."""
    head_dim = docs[0][0].y.shape[1]
    bases = [basis_of(head, kernel.is_exponential) for head in docs]
    variances = torch.zeros(_COUNTED + 1, dtype=torch.float64)
    for head, basis in zip(docs, bases, strict=True):
        moments = OutputMoments(head, basis, kernel, _COUNTED)
        square = max(moments.square, 1e-300)
        variances += torch.tensor([moments.of_degree(n) / square for n in range(_COUNTED + 1)])
    growth = float(variances[_COUNTED] / variances[_COUNTED - 1].clamp_min(1e-300))
    growth = min(max(growth, 1e-4), 0.9 * kernel.radius**2 if math.isfinite(kernel.radius) else 1e4)

    def deviation(degree: int) -> float:
        known = min(degree, _COUNTED)
        return math.sqrt(float(variances[known]) * growth ** (degree - known))

    counts = counts_of(kernel, head_dim, num_features, deviation)
    tail = num_features - sum(counts)
    made = StratifiedMap(kernel, head_dim, len(docs), counts, tail, growth, kernel.is_exponential, generator)
    whole = (len(counts) - 1,) * len(docs)
    strata = Strata(counts, (), whole, tuple(bases))
    made.set_(strata, scale)
    errors = tuple(predicted_rel_error(made, head, i, scale) for i, head in enumerate(docs))
    radius = tuple(_radius(head, strata, i) for i, head in enumerate(docs))
    whole_error = math.sqrt(sum(e * e for e in errors) / len(errors))
    return made, Calibration(num_features, counts, whole_error, errors, whole, radius)


def generator_of(features: MaclaurinMap) -> torch.Generator:
    """A generator seeded by the directions of a map: what is drawn anew follows from what was drawn, in any dtype."""
    directions = dict(features.named_buffers()).get("directions", torch.empty(0))
    return torch.Generator().manual_seed(zlib.crc32(directions.detach().cpu().float().numpy().tobytes()))


def fit_temperature(
    logits_q: Tensor, logits_k: Tensor, q: Tensor, k: Tensor, key_mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Per query head, the factor of <q, k> that comes nearest to the logits <logits_q, logits_k>, least squares.

    Each row of logits counts up to a constant, which softmax ignores, and with the keys that it may attend to.

    Shape: logits_q, q (B, H, N, D), logits_k, k (B, Hk, S, D), key_mask (B, S) -> (H,).
    """
    groups = q.shape[1] // k.shape[1]
    above, below = (torch.zeros(q.shape[1], dtype=torch.float64) for _ in range(2))
    for b in spread_evenly(q.shape[0], _FITTED_SEQUENCES).tolist():
        keys = torch.arange(k.shape[2]) if key_mask is None else key_mask[b].nonzero()[:, 0].cpu()
        rows = keys if q.shape[2] == k.shape[2] else torch.arange(q.shape[2])  # not those of padding
        rows = rows[spread_evenly(len(rows), _FITTED_ROWS)]
        allowed = torch.ones(len(rows), len(keys), dtype=torch.float64, device=q.device)
        if is_causal:
            allowed *= (keys[None] <= rows[:, None] + (k.shape[2] - q.shape[2])).to(allowed)
        number = allowed.sum(-1, keepdim=True).clamp_min(1.0)
        target, fitted = (
            x[b][:, rows].double() @ y[b][:, keys].double().repeat_interleave(groups, 0).mT
            for x, y in ((logits_q, logits_k), (q, k))
        )
        target, fitted = (allowed * (t - (allowed * t).sum(-1, keepdim=True) / number) for t in (target, fitted))
        above += (target * fitted).sum((1, 2)).cpu()
        below += (fitted * fitted).sum((1, 2)).cpu()
    return above / below.clamp_min(1e-300)


def _radius(docs: Sequence[Document], strata: Strata, head: int) -> float:
    basis = strata.bases[head]
    x, y = (
        max(float((t - centre).norm(dim=-1).max()) for t in tensors)
        for tensors, centre in (
            ([doc.x for doc in docs], basis.q_centre),
            ([doc.y for doc in docs], basis.k_centre),
        )
    )
    return x * y


def taken(
    indices: Sequence[int], q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """These sequences of a batch."""
    chosen = list(indices)
    return q[chosen], k[chosen], v[chosen], None if key_mask is None else key_mask[chosen]


@torch.no_grad()
def softmax_rel_error(
    mech: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
) -> float:
    """Relative error of a mechanism's output against softmax attention of the same q, k and v."""
    exact = softmax_attention(q, k, v, key_mask=key_mask, is_causal=is_causal, scale=scale)
    out = mech(q, k, v, key_mask=key_mask, is_causal=is_causal, scale=scale).double()
    if key_mask is not None and q.shape[2] == k.shape[2]:
        out, exact = (x * key_mask[:, None, :, None] for x in (out, exact))
    return float((out - exact).norm() / exact.norm())
