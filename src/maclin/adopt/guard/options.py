"""What a guard is asked for, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from maclin.core.errors import OptionError

ACTIONS = ("exact", "warn")


@dataclass(frozen=True)
class GuardOptions:
    """How to guard; the arguments of ``maclin.guard``, where they are described.

    Raises:
        OptionError: a value outside its range; the message says what was wanted.
    """

    tolerance: float | Mapping[str, float] = 0.1
    sample_rows: int = 32
    action: str = "exact"
    confidence: float = 0.99
    max_share: float | None = 0.05
    every: int = 1
    hold_after: int | None = None
    denominators_every: int = 64
    max_bad_share: float = 0.01
    baseline_sequences: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise OptionError(f"guard: action is {self.action!r}; wanted one of {', '.join(map(repr, ACTIONS))}")
        tolerances = self.tolerance.values() if isinstance(self.tolerance, Mapping) else (self.tolerance,)
        for value in tolerances:
            if not _number(value) or not 0 < value < math.inf:
                raise OptionError(f"guard: tolerance is {value!r}; wanted a positive relative error, such as 0.1")
        for name, least in (("sample_rows", 2), ("every", 1), ("denominators_every", 0), ("baseline_sequences", 2)):
            _check_whole(name, getattr(self, name), least)
        if self.hold_after is not None:
            _check_whole("hold_after", self.hold_after, 1)
        if not _number(self.confidence) or not 0.5 < self.confidence < 1:
            raise OptionError(f"guard: confidence is {self.confidence!r}; wanted a number between 0.5 and 1, as 0.99")
        for name in ("max_share", "max_bad_share"):
            value = getattr(self, name)
            if value is not None and (not _number(value) or not 0 < value <= 1):
                raise OptionError(f"guard: {name} is {value!r}; wanted a share above 0 and at most 1")
        if self.max_bad_share is None:
            raise OptionError("guard: max_bad_share is None; wanted a share above 0 and at most 1")

    def tolerance_of(self, layer: str) -> float:
        """The tolerance of one layer."""
        return float(self.tolerance[layer] if isinstance(self.tolerance, Mapping) else self.tolerance)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise OptionError(f"guard: {name} is {value!r}; wanted a whole number of at least {least}")
