"""Stratified Maclaurin features: low degrees exactly, then the monomials that are worth most on the user's data.

What ``core.design`` finds per head becomes one choice per layer here: how many features of each degree, the same for
all heads so that they share their shapes, and per key head which monomials, in which bases, up to which degree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from .confidence import CONFIDENCE, bounded
from .design import (
    MAX_DEGREE,
    Basis,
    Document,
    Monomials,
    allocate,
    appraise,
    basis_of,
    candidates,
    multiplicity,
    split,
    truncation,
)
from .errors import OptionError
from .kernels import Kernel

WORTH = 0.95
"""More features than degrees 0 and 1 are kept where they bring the error below this times that of degree 1, in
geometric mean over the heads."""

_SEEN = 3  # candidates of degree 2 per feature of the budget; of each degree above, half as many
_LOW_DEGREE = 4  # tried beside MAX_DEGREE: beyond it the features of a sharp head serve a few rows only
_AVERAGE = -1  # as a head's highest degree: plain averaging of the values


@dataclass(frozen=True)
class Strata:
    """The exact monomials of a layer.

    Args:
        counts: features of degree 0, 1, 2, ...
        axes: per key head and degree, the axes of its monomials, (count, degree).
        highest: per key head, the highest degree it uses: where more would harm, the rest of its features are 0.
            -1 is plain averaging.
        bases: per key head.
        rel_errors: per key head, of its output on the documents that were held back; empty without data.
        rel_error: of the whole layer, the same way; None without data.
        bound: of rel_error on other documents of the same kind, by how much the documents that were held back differ.
    """

    counts: tuple[int, ...]
    axes: tuple[tuple[Tensor, ...], ...]
    highest: tuple[int, ...]
    bases: tuple[Basis, ...]
    rel_errors: tuple[float, ...] = ()
    rel_error: float | None = None
    bound: float | None = None

    def tensors(self, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """Directions (Hk, D, sum of degrees) as ``RandomMaclaurin`` has them, and coefficients (Hk, M).

        A direction is the unit vector of an axis. Features stand by degree, the highest first.
        """
        ranks: list[Tensor] = []
        coefficients: list[Tensor] = []
        width = len(self.bases[0].spread)
        for axes, highest in zip(self.axes, self.highest, strict=True):
            ordered = axes[::-1]
            coefficients.append(
                torch.cat(
                    [
                        (kernel.coefficient(chosen.shape[1]) * multiplicity(chosen)).sqrt()
                        * (chosen.shape[1] <= max(highest, 0))
                        for chosen in ordered
                    ]
                )
            )
            rows = [
                torch.cat([chosen[:, rank] for chosen in ordered if chosen.shape[1] > rank])
                for rank in range(len(axes) - 1)
            ]
            ranks.append(torch.nn.functional.one_hot(torch.cat(rows), width).mT)
        return torch.stack(ranks).float(), torch.stack(coefficients).float()

    def matrices(self, scale: float) -> dict[str, Tensor]:
        """Bases (Hk, D, D) and centres (Hk, D) as buffers: centres are of x and y before they are scaled."""
        used = [b if h > _AVERAGE else _without_centre(b) for b, h in zip(self.bases, self.highest, strict=True)]
        root = math.sqrt(scale)
        return {
            "q_basis": torch.stack([b.q for b in used]).float(),
            "k_basis": torch.stack([b.k for b in used]).float(),
            "q_centre": torch.stack([b.q_centre for b in used]).float() / root,
            "k_centre": torch.stack([b.k_centre for b in used]).float() / root,
        }


def degrees_of(counts: Sequence[int]) -> tuple[int, ...]:
    """Degree of each feature, the highest first."""
    return tuple(degree for degree in reversed(range(len(counts))) for _ in range(counts[degree]))


def assumed(kernel: Kernel, head_dim: int, num_features: int) -> tuple[int, ...]:
    """Counts without data: isotropic q and k of radius 1, for which no direction is better than another.

    With some of the D (D + 1) / 2 monomials of degree 2, the error of degree 1 falls to sqrt(1 - share of its
    energy); they are taken where that is worth it.
    """
    mixed = head_dim * (head_dim - 1) // 2
    left = min(num_features - 1 - head_dim, head_dim + mixed)
    # of normal u and w the variance over keys of (u_i w_i)^2 / 2 is 1.5 times that of u_i u_j w_i w_j
    squares = sum(axes[0] == axes[1] for axes in _fewest_axes(2, left)) if left > 0 else 0
    share = (left + 0.5 * squares) / (1.5 * head_dim + mixed)
    if left > 0 and kernel.coefficient(2) > 0 and math.sqrt(max(1.0 - share, 0.0)) <= WORTH:
        return (1, head_dim, left)
    return (1, head_dim)


def without_data(head_dim: int, num_kv_heads: int, counts: Sequence[int]) -> Strata:
    """The monomials of each degree that need the fewest axes, as they are: none is worth much more than another."""
    axes = [
        torch.tensor(_fewest_axes(degree, count), dtype=torch.int64).view(count, degree)
        for degree, count in enumerate(counts)
    ]
    for chosen in axes:
        if chosen.numel() and int(chosen.max()) >= head_dim:
            raise OptionError(
                f"macformer: counts are {tuple(counts)}, but {head_dim} axes have fewer monomials of degree "
                f"{chosen.shape[1]}; pass smaller counts"
            )
    bases = (plain_basis(head_dim),) * num_kv_heads
    return Strata(tuple(counts), (tuple(axes),) * num_kv_heads, (len(counts) - 1,) * num_kv_heads, bases)


def _fewest_axes(degree: int, count: int) -> list[tuple[int, ...]]:
    """The first monomials of a degree by their largest axis; each as its axes, ascending."""
    found: list[tuple[int, ...]] = [] if degree else [()] * count
    largest = 0
    while len(found) < count:
        found += ((*rest, largest) for rest in combinations_with_replacement(range(largest + 1), degree - 1))
        largest += 1
    return found[:count]


def plain_basis(head_dim: int) -> Basis:
    """The axes as they are, nothing shifted."""
    eye, zero = torch.eye(head_dim, dtype=torch.float64), torch.zeros(head_dim, dtype=torch.float64)
    return Basis(eye, eye, zero, zero, torch.ones(head_dim, dtype=torch.float64))


class Layer:
    """One layer's documents, from which strata of any size are cut.

    Args:
        docs: per key head.
        kernel: f.
        most: the largest number of features that will be asked for.
        floor: of the denominators; see ``core.contract``.
        counts: features of degree 0, 1, 2, ... that will be asked for; empty where the choice is free.
    """

    def __init__(
        self,
        docs: Sequence[Sequence[Document]],
        kernel: Kernel,
        most: int,
        floor: float,
        counts: Sequence[int] = (),
    ) -> None:
        self.kernel = kernel
        self.floor = floor
        halves = [split(head) for head in docs]
        self.held_out = [held for _, held in halves]
        self.bases = [basis_of(learn, kernel.is_exponential) for learn, _ in halves]
        self._docs = [learn for learn, _ in halves]
        self._seen = [
            max(_SEEN * most >> n - 2, *counts[n : n + 1], 1) for n in range(2, max(MAX_DEGREE + 1, len(counts)))
        ]
        self.first = self._cut([candidates(basis.spread, ()) for basis in self.bases])

    @cached_property
    def heads(self) -> list[Monomials]:
        """The candidates of each head, appraised; what takes the time, so only where degree 1 is not enough."""
        return [
            appraise(docs, basis, self.kernel, candidates(basis.spread, self._seen))
            for docs, basis in zip(self._docs, self.bases, strict=True)
        ]

    def strata(self, counts: Sequence[int]) -> Strata:
        """The best monomials in these numbers, and their error on the documents that were held back."""
        return self._cut([tuple(a[:count] for a, count in zip(head.axes, counts, strict=False)) for head in self.heads])

    def _cut(self, axes: Sequence[tuple[Tensor, ...]]) -> Strata:
        highest: list[int] = []
        errors: list[float] = []
        squares, totals = (torch.zeros(len(self.held_out[0]), dtype=torch.float64) for _ in range(2))
        for docs, basis, chosen in zip(self.held_out, self.bases, axes, strict=True):
            each = [truncation([doc], basis, self.kernel, chosen, self.floor) for doc in docs]
            square = torch.stack([found for found, _ in each]).nan_to_num(torch.inf, torch.inf, torch.inf)
            total = torch.tensor([of_out for _, of_out in each], dtype=torch.float64)
            best = int(square.sum(0).argmin())
            highest.append(best - 1)
            errors.append(math.sqrt(float(square[:, best].sum() / total.sum().clamp_min(1e-300))))
            squares, totals = squares + square[:, best], totals + total
        rel_error, bound = bounded(squares, totals, CONFIDENCE)
        counts = tuple(len(chosen) for chosen in axes[0])
        return Strata(counts, tuple(axes), tuple(highest), tuple(self.bases), tuple(errors), rel_error, bound)

    def best(self, num_features: int) -> Strata:
        """The best strata within a budget; degrees 0 and 1 alone where more features are hardly better."""
        found = self._of(num_features)
        return found if _mean_error(found) <= WORTH * _mean_error(self.first) else self.first

    def _of(self, num_features: int) -> Strata:
        """The best strata of this size: low degrees where logits are sharp, higher ones where the series converges."""
        choices = {
            allocate(self.heads, self.first.rel_errors, num_features, highest) for highest in (MAX_DEGREE, _LOW_DEGREE)
        }
        return min((self.strata(counts) for counts in choices), key=_mean_error)


def _mean_error(strata: Strata) -> float:
    """Geometric mean over the heads, so that a head that nothing helps has no say."""
    logs = [math.log(max(error, 1e-12)) for error in strata.rel_errors]
    return math.exp(sum(logs) / len(logs))


def _without_centre(basis: Basis) -> Basis:
    zero = torch.zeros_like(basis.q_centre)
    return Basis(basis.q, basis.k, zero, zero, basis.spread)
