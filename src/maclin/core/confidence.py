"""How much worse other documents may be than those that were seen."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

CONFIDENCE = 0.95
"""With which the bound of an error holds on as many other documents of the same kind."""

_ASSUMED, _ITS_DOCUMENTS = 0.3, 2  # spread of squared errors over their mean that few documents are taken to have
_UNKNOWN = 1.25  # bound over error where there is one document only


def bounded(squares: Tensor, totals: Tensor, confidence: float) -> tuple[float, float]:
    """Relative error over documents, and its bound on as many other ones.

    With squared errors e_i and squared outputs s_i the error is sqrt(r), r = sum e / sum s. The standard error of r,
    a ratio of sums, follows from the residuals e_i - r s_i. The bound is sqrt(r exp(t sqrt(2) deviation / r)) with
    Student's t: sqrt(2) because both samples vary, and in logarithms because single documents are far above the mean
    and none can be below 0. For the same reason a sample tells less of its spread than a normal one would, and t has
    half its degrees of freedom. One document alone says nothing of others.

    Shape: squares, totals (documents,).
    """
    total, number = max(float(totals.sum()), 1e-300), len(squares)
    ratio = float(squares.sum()) / total
    if number < 2 or not 0 < ratio < math.inf:
        return math.sqrt(ratio), _UNKNOWN * math.sqrt(ratio)
    free = number - 1
    # per document, over the mean; a few may agree by chance, so some are added that have the usual spread
    spread = float((squares - ratio * totals).square().sum()) * (number / (ratio * total)) ** 2
    variance = (spread + _ITS_DOCUMENTS * _ASSUMED**2) / (free + _ITS_DOCUMENTS)
    more = student(confidence, (free + 1) // 2) * math.sqrt(2 * variance / number)
    return math.sqrt(ratio), math.sqrt(ratio * math.exp(min(more, 600.0)))


def student(confidence: float, free: int) -> float:
    """The one-sided quantile of Student's t with ``free`` degrees of freedom, 0.5 <= confidence < 1.

    In closed form for 1 and 2; above, the expansion in 1 / free around the normal quantile, to a hundredth up to a
    confidence of 0.99.
    """
    if free == 1:
        return math.tan(math.pi * (confidence - 0.5))
    if free == 2:
        return (2 * confidence - 1) / math.sqrt(2 * confidence * (1 - confidence))
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free**power for power, term in enumerate(terms, 1))
