"""The figures of the study of ppSBN, found again by what they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ...records import Config
from .variants import BASELINES, VARIANTS, Variant


@dataclass(frozen=True)
class Subject:
    """What was trained: a baseline, or a variant with an estimator.

    Args:
        variant: name of either.
        estimator: None for a baseline.
    """

    variant: str
    estimator: str | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.variant if self.estimator is None else f"{self.estimator}: {self.variant}"


def subjects(estimators: Iterable[str]) -> list[Subject]:
    """Baselines, then every variant of every estimator."""
    found = [Subject(name) for name in BASELINES]
    return [*found, *(Subject(variant.name, estimator) for estimator in estimators for variant in VARIANTS)]


def with_pre(*, post: bool | None = None, pre: str | None = None) -> list[str]:
    """Names of the variants that standardise q and k."""
    return [v.name for v in VARIANTS if v.pre and post in (None, v.post) and pre in (None, v.pre)]


def without_pre() -> list[str]:
    """Names of the variants that leave q and k as they are."""
    return [v.name for v in VARIANTS if not v.pre]


def with_and_without_post() -> list[tuple[Variant, Variant]]:
    """Pairs that differ in the second half only: with it, without it."""
    return [(a, b) for a in VARIANTS for b in VARIANTS if a.post and not b.post and a.pre == b.pre]


class Cells:
    """Measured cells, to be chosen from.

    Args:
        cells: measurements of one part of the study.
        guessing: accuracy that a run counts with which has none, because a step was not finite.
    """

    def __init__(self, cells: Iterable[Config], guessing: float = 0.0) -> None:
        self.cells = list(cells)
        self.guessing = guessing

    def __len__(self) -> int:
        return len(self.cells)

    def where(self, **wanted: Any) -> Cells:
        """Those with these values; a list stands for any of its values."""
        kept = self.cells
        for name, value in wanted.items():
            values = value if isinstance(value, list) else [value]
            kept = [cell for cell in kept if cell.get(name) in values]
        return Cells(kept, self.guessing)

    def of(self, subject: Subject) -> Cells:
        """The runs of a subject."""
        return self.where(variant=subject.variant, estimator=subject.estimator)

    def values(self, name: str) -> list[float]:
        """The figures of that name that exist."""
        return [cell[name] for cell in self.cells if cell.get(name) is not None]

    def median(self, name: str) -> float | None:
        """None where there is no figure."""
        found = self.values(name)
        return median(found) if found else None

    def largest(self, name: str) -> float | None:
        """None where there is no figure."""
        return max(self.values(name), default=None)

    def count(self, name: str) -> int:
        """Cells in which it is true."""
        return sum(bool(cell[name]) for cell in self.cells)

    def accuracies(self, name: str = "accuracy") -> list[float]:
        """Accuracies of all runs."""
        return [self._accuracy(cell, name) for cell in self.cells]

    def accuracy(self, name: str = "accuracy") -> float | None:
        """Mean accuracy; None where there is no run."""
        found = self.accuracies(name)
        return fmean(found) if found else None

    def gains(self, variant: str, over: str, name: str = "accuracy") -> list[float]:
        """Accuracies of a variant, less those of another variant or a baseline in the run of the same place."""
        place = ["learning_rate", "batch_size", "seed", *([] if over in BASELINES else ["estimator"])]
        others = {tuple(cell[n] for n in place): self._accuracy(cell, name) for cell in self.where(variant=over).cells}
        mine = [(tuple(cell[n] for n in place), cell) for cell in self.where(variant=variant).cells]
        return [self._accuracy(cell, name) - others[key] for key, cell in mine if key in others]

    def _accuracy(self, cell: Config, name: str) -> float:
        found = cell.get(name)
        return self.guessing if found is None else found
