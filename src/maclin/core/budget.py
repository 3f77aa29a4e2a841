"""What may be asked of Macformer's features: the options checked together, with what would work instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .confidence import CONFIDENCE
from .errors import OptionError
from .kernels import Kernel

_NAME = "macformer"


def num_features_of(
    kernel: Kernel,
    head_dim: int,
    *,
    estimator: str,
    num_features: object,
    tolerance: float | None,
    unbiased: bool,
    counts: Sequence[int] | None,
    centred: bool,
    confidence: float = CONFIDENCE,
) -> int:
    """The number of features that these options allow before calibration.

    Raises:
        OptionError: options that exclude each other, or a number that is too small; the message says what works.
    """
    if estimator != "stratified":
        for option, given in (
            ("num_features='auto'", num_features == "auto"),
            ("unbiased", unbiased),
            ("counts", counts is not None),
            ("centred", centred),
        ):
            if given:
                raise OptionError(f"{_NAME}: {option} needs estimator='stratified', and estimator is {estimator!r}")
    if centred and not kernel.is_exponential:
        raise OptionError(
            f"{_NAME}: centred=True with kernel {kernel.name!r}; only exp (and trigh, the same function) turns a shift "
            "into a factor: pass centred=False"
        )
    _check_tolerance(num_features, tolerance)
    _check_confidence(num_features, confidence)
    if num_features == "auto":
        if unbiased or counts is not None:
            raise OptionError(f"{_NAME}: num_features='auto' excludes unbiased and counts, which fix the features")
        return head_dim + 1
    least = {"stratified": head_dim + 2, "taylor": head_dim + 1}.get(estimator, 2)
    if counts is not None:
        _check_counts(counts, head_dim)
        least = sum(int(count) for count in counts) + int(unbiased)
    number = max(128, 2 * head_dim) if num_features is None else num_features
    if num_features is None and counts is not None and not unbiased:
        number = least
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        hint = "; estimator='taylor' has D + 1" if estimator == "stratified" and counts is None else ""
        raise OptionError(
            f"{_NAME}: num_features is {number!r}; wanted an integer of at least {least}"
            + (" (D + 2)" if hint else "")
            + (f", 'auto' with a tolerance, or None{hint}" if estimator == "stratified" else "")
        )
    return number


def _check_tolerance(num_features: object, tolerance: float | None) -> None:
    if num_features == "auto" and tolerance is None:
        raise OptionError(
            f"{_NAME}: num_features='auto' needs tolerance=, the relative error of the attention output to keep to; "
            "0.1 is 10 %"
        )
    if tolerance is None:
        return
    if num_features != "auto":
        raise OptionError(f"{_NAME}: tolerance={tolerance:g} needs num_features='auto', and it is {num_features!r}")
    if not 0 < tolerance < 1:
        raise OptionError(f"{_NAME}: tolerance is {tolerance:g}; wanted a relative error between 0 and 1, 0.1 is 10 %")


def _check_confidence(num_features: object, confidence: object) -> None:
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0.5 <= confidence < 1:
        raise OptionError(
            f"{_NAME}: confidence is {confidence!r}; wanted a probability from 0.5 to below 1, as 0.95: how sure the "
            "tolerance is to be kept on other sequences"
        )
    if confidence != CONFIDENCE and num_features != "auto":
        raise OptionError(
            f"{_NAME}: confidence={confidence:g} needs num_features='auto' with a tolerance, and it is {num_features!r}"
        )


def _check_counts(counts: Sequence[int], head_dim: int) -> None:
    wanted = f"wanted (1, {head_dim}, features of degree 2, of degree 3, ...)"
    if len(counts) < 2 or counts[0] != 1 or counts[1] != head_dim or any(int(c) != c or c < 0 for c in counts):
        raise OptionError(f"{_NAME}: counts is {tuple(counts)}; {wanted}: degrees 0 and 1 are exact")
    for degree, count in enumerate(counts):
        there_are = math.comb(head_dim + degree - 1, degree)
        if count > there_are:
            raise OptionError(
                f"{_NAME}: counts asks for {count} features of degree {degree}, and {head_dim} axes have {there_are} "
                f"monomials of it; {wanted}"
            )
