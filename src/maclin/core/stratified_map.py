"""The feature map of macformer's own estimator: what ``core.stratified`` chose, as buffers and as maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .design import Basis
from .fast.maps import Maps
from .fast.spec import Side, Spec
from .features import RandomMaclaurin, rademacher
from .kernels import Kernel
from .maps import ProductMap, by_rank
from .stratified import Strata, degrees_of, without_data
from .unbiased import draw_degrees, tail_law

FLOOR = 0.7
"""Of the denominator where keys are centred, in shares of that of plain averaging. By Jensen's inequality the true one
is at least 1 where the centre is the mean of the keys at hand; it is that of the calibration data."""


class StratifiedMap(ProductMap):
    """Exact monomials in given bases; with a tail, random products of every degree that is not exact.

    u = q_basis^T (x - q_centre) and w = k_basis^T (y - k_centre); a feature is coefficient x product of <direction, u>,
    where the direction of an exact monomial is the unit vector of an axis and that of a random one holds signs. Where
    ``centred``, each key has the weight exp(scale <q_centre, y - k_centre>), its exponent at most 60 in size
    (beyond, it is cut, and counted by ``maclin.guarded``).

    Args:
        kernel: f.
        head_dim: D.
        num_kv_heads: Hk.
        counts: features of degree 0, 1, 2, ...
        tail: None leaves the other degrees out; otherwise the features beyond degree 1 are random (but for a whole
            degree 2) and this many more have random degrees: all that have no count.
        growth: of the variance from degree to degree, for the law of the tail.
        centred: whether q and k are shifted, for the exponential kernel only.
        generator: of the draw.
    """

    coefficients: Tensor
    growth: Tensor
    q_basis: Tensor
    k_basis: Tensor
    q_centre: Tensor
    k_centre: Tensor
    axes: Tensor
    index: Tensor

    def __init__(
        self,
        kernel: Kernel,
        head_dim: int,
        num_kv_heads: int,
        counts: Sequence[int],
        tail: int | None = None,
        growth: float = 1.0,
        centred: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(kernel, head_dim, num_kv_heads, sum(counts) + (tail or 0))
        self.counts = tuple(counts)
        self.tail = tail
        self.centred = centred
        self.num_exact = self._num_exact()
        self.register_buffer("coefficients", torch.empty(0))
        self.register_buffer("growth", torch.tensor(growth))
        self.register_buffer("axes", torch.empty(0), persistent=False)
        self.register_buffer("index", torch.empty(0, dtype=torch.int64), persistent=False)
        eye = torch.eye(head_dim).expand(num_kv_heads, -1, -1)
        self.register_buffer("q_basis", eye.clone())
        self.register_buffer("k_basis", eye.clone())
        self.register_buffer("q_centre", torch.zeros(num_kv_heads, head_dim))
        self.register_buffer("k_centre", torch.zeros(num_kv_heads, head_dim))
        if tail is None:
            self.set_(without_data(head_dim, num_kv_heads, counts), 1.0)
        else:
            self.resample_(generator)

    @property
    def num_projections(self) -> int:
        """The axes that exact monomials of degree 2 and more are made of; with a tail, the sum of the degrees."""
        return self.axes.shape[-1] if self.tail is None else super().num_projections

    def basis(self, head: int, scale: float) -> Basis:
        """Bases and centres of a key head, for vectors times scale^(1/2)."""
        q, k, q_centre, k_centre = (
            getattr(self, name)[head].double().cpu() for name in ("q_basis", "k_basis", "q_centre", "k_centre")
        )
        root = math.sqrt(scale)
        return Basis(q, k, q_centre * root, k_centre * root, torch.ones(self.head_dim, dtype=torch.float64))

    @property
    def floor(self) -> float:
        """That of truncated series of centred keys; random ones stay unbiased."""
        return FLOOR if self.centred and self.tail is None else 0.0

    def drawn_counts(self) -> dict[int, int]:
        """Degrees above the exact ones that have a count."""
        if self.tail is None:
            return {}
        return {n: m for n, m in enumerate(self.counts) if n >= self.num_exact and m}

    def drawn_law(self) -> tuple[int, Mapping[int, float]]:
        """The tail."""
        law = self._law()
        return (self.tail or 0) if law else 0, law

    def _law(self) -> Mapping[int, float]:
        without = [n for n in range(self.num_exact, len(self.counts)) if not self.counts[n]]
        return tail_law(self.kernel, len(self.counts), float(self.growth), without)

    def _num_exact(self) -> int:
        """How many degrees, from 0 on, are exact."""
        if self.tail is None:
            return len(self.counts)
        whole = len(self.counts) > 2 and self.counts[2] == self.head_dim * (self.head_dim + 1) // 2
        return 3 if whole else 2

    def set_(self, strata: Strata, scale: float) -> None:
        """Take over monomials, bases and centres that were found at this scale."""
        for name, value in strata.matrices(scale).items():
            setattr(self, name, value.to(getattr(self, name)))
        if self.tail is None:
            directions, coefficients = strata.tensors(self.kernel)
            self._take(degrees_of(self.counts))
            self.degrees = torch.tensor(self.map.degrees, device=self.degrees.device)
            self.directions = directions.to(self.directions)
            self.coefficients = coefficients.to(self.coefficients)
            self._gather()

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions, and new degrees of the tail; nothing is drawn without one."""
        if self.tail is None:
            return
        exact = without_data(self.head_dim, self.num_kv_heads, self.counts[: self.num_exact])
        of_exact, its_coefficients = exact.tensors(self.kernel)
        law = self._law()
        beyond = draw_degrees(law, self.tail, generator)
        beyond += [len(self.counts)] * (self.tail - len(beyond))  # a polynomial has no tail: features of weight 0
        counted = degrees_of([0] * self.num_exact + list(self.counts[self.num_exact :]))
        drawn = sorted((*beyond, *counted), reverse=True)
        degrees = (*drawn, *degrees_of(self.counts[: self.num_exact]))
        self._take(degrees)
        shape = (self.num_kv_heads, self.head_dim, sum(drawn))
        signs, start, parts = rademacher(shape, generator), 0, list[Tensor]()
        taken = 0
        for rank in range(1, max(degrees, default=0) + 1):
            of_drawn = sum(degree >= rank for degree in drawn)
            of_monomials = sum(n * (degree >= rank) for degree, n in enumerate(self.counts[: self.num_exact]))
            parts += [signs[..., start : start + of_drawn], of_exact[..., taken : taken + of_monomials]]
            start, taken = start + of_drawn, taken + of_monomials
        expected = [self._expected(n, law) for n in drawn]
        random = torch.tensor([math.sqrt(self.kernel.coefficient(n) * e) for n, e in zip(drawn, expected, strict=True)])
        self.degrees = torch.tensor(degrees, device=self.degrees.device)
        self.directions = torch.cat(parts, dim=-1).to(self.directions)
        self.coefficients = torch.cat([random.expand(self.num_kv_heads, -1), its_coefficients], -1).to(
            self.coefficients
        )

    def _expected(self, degree: int, law: Mapping[int, float]) -> float:
        """One over the expected number of features of a degree that is not exact."""
        if degree < len(self.counts) and self.counts[degree]:
            return 1.0 / self.counts[degree]
        probability = law.get(degree, 0.0)
        return 1.0 / (probability * self.tail) if probability and self.tail else 0.0

    def _take(self, degrees: Sequence[int]) -> None:
        constant = math.sqrt(self.kernel.coefficient(0))  # of the last feature; coefficients weigh the others
        self.map = RandomMaclaurin(tuple(degrees), (*(1.0,) * (len(degrees) - 1), constant))

    @property
    def powers(self) -> tuple[int, ...]:
        """Descending; where all are exact, degree 1 stands first."""
        if self.tail is not None:
            return super().powers
        high = tuple(n for n in self.map.degrees if n > 1)
        return (*(1,) * self.head_dim, *high, 0)

    def maps(self, scale: float) -> Maps:
        """The two maps, which differ in basis and centre."""
        spec, weights, columns, index = self._exact(scale) if self.tail is None else self._drawn(scale)
        sides: list[Side] = []
        for basis, centre in ((self.q_basis, self.q_centre), (self.k_basis, self.k_centre)):
            projection = None if columns is None else basis @ columns
            sides.append(Side(projection, index=index, shift=centre if self.centred else None))
        query, key = sides
        if not self.centred:
            return Maps(spec, spec, query, key, weights, weights)
        of_weight = scale * self.q_centre[..., None]
        projection = of_weight if key.projection is None else torch.cat([key.projection, of_weight], dim=-1)
        weighted = replace(spec, weighted=True)
        key = key._replace(projection=projection)
        return Maps(spec, weighted, query, key, weights, weights)

    def _exact(self, scale: float) -> tuple[Spec, Tensor, Tensor | None, Tensor | None]:
        """Monomials gathered from few projections, beside the vector itself, which is all of degree 1."""
        ranks = tuple(sum(self.counts[n:]) for n in range(2, len(self.counts)))
        spec = Spec("product", ranks=ranks[:1] + ranks, constants=1, gathered=True, linear=True)
        if not sum(ranks):
            spec = replace(spec, ranks=(), gathered=False)
        most = spec.ranks[0] if spec.ranks else 0
        degrees = self.degrees[:most].to(self.coefficients)
        high = self.coefficients[:, :most] * scale ** (0.5 * degrees)
        linear = self.coefficients[:, most : most + self.head_dim] * math.sqrt(scale)
        constant = linear.new_full((len(linear), 1), self.map.weights[-1])
        weights = torch.cat([linear, high, constant], dim=-1)
        if not most:
            return spec, weights, None, None
        return spec, weights, self.axes, self.index

    def _drawn(self, scale: float) -> tuple[Spec, Tensor, Tensor | None, Tensor | None]:
        """Products rank by rank, as they were drawn."""
        spec = by_rank(self.map)
        first = spec.ranks[0] if spec.ranks else 0
        constants = torch.full_like(self.coefficients[:, first:], self.map.weights[-1])
        weights = torch.cat([self.coefficients[:, :first], constants], dim=-1)
        ones = RandomMaclaurin(self.map.degrees, (1.0,) * len(self.map.degrees))
        return spec, weights, ones.columns(self.directions, scale), None

    def _gather(self) -> None:
        """Find the axes that the monomials of degree 2 and more are made of, and which factor is which of them."""
        if self.tail is not None:
            return
        most = sum(self.counts[2:])
        parts = self.directions.argmax(-2).split(self.map.counts_by_rank, dim=-1)
        chosen = torch.cat([part[:, :most] for part in parts], dim=-1)  # (Hk, factors): the axis of each
        used = torch.zeros(len(chosen), self.head_dim, dtype=torch.int64, device=chosen.device).scatter(1, chosen, 1)
        width = int(used.sum(-1).amax()) if most else 0
        order = used.argsort(dim=-1, descending=True, stable=True)
        place = order.argsort(dim=-1)  # of each axis among those in use
        self.axes = torch.nn.functional.one_hot(order[:, :width], self.head_dim).mT.to(self.directions)
        self.index = place.gather(1, chosen)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._gather()
