"""Scores of translations: BLEU over words and chrF over characters, of a whole corpus with one reference each."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..core.errors import InputError

_WORD = re.compile(r"\w+|[^\w\s]")
_BLEU_ORDER, _CHRF_ORDER, _CHRF_BETA = 4, 6, 2.0


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """100 · BP · exp(mean of log p_n for n = 1 to 4), BP = min(1, exp(1 − r / c)).

    p_n is the share of the output's n-grams that the reference has too, each counted as often as there; an order
    without any match counts as half a match, then a quarter, as in the exponential smoothing of NIST. Words are runs of
    letters and digits; every other sign is a word of its own.

    Args:
        outputs: what was translated.
        references: what is right, in the same order.

    Raises:
        InputError: not as many outputs as references, or none.

    Source: Papineni et al. 2002; smoothing of Chen & Cherry 2014, method 3. Deviation: none.
    """
    _check(outputs, references)
    matches, totals = [0] * _BLEU_ORDER, [0] * _BLEU_ORDER
    produced = wanted = 0
    for output, reference in zip(outputs, references, strict=True):
        words, right = _WORD.findall(output), _WORD.findall(reference)
        produced += len(words)
        wanted += len(right)
        for n in range(1, _BLEU_ORDER + 1):
            got = _grams(words, n)
            matches[n - 1] += (got & _grams(right, n)).total()
            totals[n - 1] += got.total()
    if not matches[0] or not all(totals):
        return 0.0
    log_sum, halving = 0.0, 1.0
    for match, total in zip(matches, totals, strict=True):
        if not match:
            halving *= 2
        log_sum += math.log((match or 1 / halving) / total)
    penalty = min(1.0, math.exp(1 - wanted / produced))
    return 100 * penalty * math.exp(log_sum / _BLEU_ORDER)


def chrf(outputs: Sequence[str], references: Sequence[str]) -> float:
    """100 · (1 + β²) P R / (β² P + R), β = 2; P and R are means over character n-grams of order 1 to 6.

    Args:
        outputs: what was translated.
        references: what is right, in the same order.

    Raises:
        InputError: not as many outputs as references, or none.

    Source: Popović 2015; without spaces, counted over the corpus. Deviation: none.
    """
    _check(outputs, references)
    precisions, recalls = [], []
    for n in range(1, _CHRF_ORDER + 1):
        match = produced = wanted = 0
        for output, reference in zip(outputs, references, strict=True):
            got, right = (_grams("".join(text.split()), n) for text in (output, reference))
            match += (got & right).total()
            produced += got.total() if right else 0  # a reference that is too short for this order judges nothing
            wanted += right.total()
        if produced and wanted:
            precisions.append(match / produced)
            recalls.append(match / wanted)
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weighted = _CHRF_BETA**2 * precision + recall
    return 100 * (1 + _CHRF_BETA**2) * precision * recall / weighted if weighted else 0.0


def _grams(items: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    slices: Iterable[Sequence[str]] = (items[i:] for i in range(n))
    return Counter(zip(*slices, strict=False))


def _check(outputs: Sequence[str], references: Sequence[str]) -> None:
    if len(outputs) != len(references) or not outputs:
        raise InputError(f"wanted as many translations as references, got {len(outputs)} and {len(references)}")
