"""Maclaurin feature maps as modules: what is drawn or chosen lies in buffers, one set per key head.

Each has ``num_features``, ``num_projections`` and ``maps(scale)``, which returns the maps of blocks of q (B, H, n, D)
and of k (B, Hk, n, D), both normalised already but not scaled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import statistics
from .algebra import grouped
from .design import Basis
from .features import DEGREE_LAWS, PUBLISHED_MAX_DEGREE, RandomMaclaurin, rademacher, taylor_features
from .kernels import Kernel
from .norms import WideBuffers
from .stratified import Strata, degrees_of, plain_basis, without_data
from .unbiased import draw_degrees, tail_law

PhiMaps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

FLOOR = 0.7
"""Of the denominator where keys are centred, in shares of that of plain averaging. By Jensen's inequality the true one
is at least 1 where the centre is the mean of the keys at hand; it is that of the calibration data."""

_MOST_EXPONENT = 60.0  # of a key's weight: float32 holds exp(60) times the sums over it


class MaclaurinMap(WideBuffers, ABC):
    """Features of a kernel f: <phi(x), phi(y)> is f(<x, y>), an estimate of it, or part of its series."""

    kernel: Kernel
    head_dim: int
    num_kv_heads: int
    num_features: int

    def __init__(self, kernel: Kernel, head_dim: int, num_kv_heads: int, num_features: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self.num_features = num_features

    @property
    @abstractmethod
    def num_projections(self) -> int:
        """Inner products with a vector of width D that the features of a token take."""

    @abstractmethod
    def maps(self, scale: float) -> PhiMaps:
        """The maps of q and k for this scale of <q, k>."""

    @property
    def floor(self) -> float:
        """Least denominator in shares of the constant feature's; see ``core.contract``."""
        return 0.0

    def basis(self, head: int, scale: float) -> Basis:
        """In which the features of a key head are products, for vectors times scale^(1/2); here the axes."""
        return plain_basis(self.head_dim)

    def drawn_counts(self) -> dict[int, int]:
        """Number of random features of each degree that has a number of its own; here none."""
        return {}

    def drawn_law(self) -> tuple[int, Mapping[int, float]]:
        """How many features have a random degree, and its law; here none."""
        return 0, {}

    def is_exact(self) -> bool:
        """Whether nothing is random."""
        return not self.drawn_counts() and not self.drawn_law()[0]

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw again what is drawn, in place; here nothing is."""


class TaylorMap(MaclaurinMap):
    """Degrees 0 and 1 exactly: D + 1 features without a projection."""

    def __init__(self, kernel: Kernel, head_dim: int, num_kv_heads: int) -> None:
        super().__init__(kernel, head_dim, num_kv_heads, head_dim + 1)

    @property
    def num_projections(self) -> int:
        """None: the vector itself is the features."""
        return 0

    def maps(self, scale: float) -> PhiMaps:
        """phi(x) = [sqrt(a_0), sqrt(a_1 scale^(1/2)) x] on both sides."""
        half = math.sqrt(scale)

        def phi(x: Tensor) -> Tensor:
            return taylor_features(x * half, self.kernel)

        return phi, phi


class _ProductMap(MaclaurinMap):
    """Features that are products of projections; the degrees of some may be drawn, and with them the shapes."""

    degrees: Tensor
    directions: Tensor

    def __init__(self, kernel: Kernel, head_dim: int, num_kv_heads: int, num_features: int) -> None:
        super().__init__(kernel, head_dim, num_kv_heads, num_features)
        self.register_buffer("degrees", torch.empty(0, dtype=torch.int64))
        self.register_buffer("directions", torch.empty(0))

    @property
    def num_projections(self) -> int:
        """Inner products per token: the sum of the degrees."""
        return self.directions.shape[-1]

    @abstractmethod
    def _take(self, degrees: Sequence[int]) -> None:
        """Prepare for features of these degrees, the highest first."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # another draw has other degrees, and with them other shapes: take them over before the tensors are copied
        degrees, directions = (state_dict.get(prefix + key) for key in ("degrees", "directions"))
        if isinstance(degrees, Tensor) and degrees.shape == self.degrees.shape and directions is not None:
            self._take([int(n) for n in degrees])
            self.directions = self.directions.new_empty(self.num_kv_heads, self.head_dim, int(degrees.sum()))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class DrawnMap(_ProductMap):
    """Degrees drawn from a law of ``DEGREE_LAWS``, directions from random signs."""

    def __init__(
        self,
        kernel: Kernel,
        head_dim: int,
        num_kv_heads: int,
        num_features: int,
        law: str,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(kernel, head_dim, num_kv_heads, num_features)
        self.law = law
        self.resample_(generator)

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw new degrees and directions."""
        self._take(DEGREE_LAWS[self.law].draw(self.num_features, generator))
        shape = (self.num_kv_heads, self.head_dim, self.map.num_directions)
        self.degrees = torch.tensor(self.map.degrees, device=self.degrees.device)
        self.directions = rademacher(shape, generator).to(self.directions)

    def _take(self, degrees: Sequence[int]) -> None:
        self.map = DEGREE_LAWS[self.law].features(self.kernel, degrees)

    def drawn_law(self) -> tuple[int, Mapping[int, float]]:
        """All features, but for the constant of "published"."""
        number = self.num_features - (self.law == "published")
        expected = DEGREE_LAWS[self.law].expected
        degrees = range(int(self.law == "published"), PUBLISHED_MAX_DEGREE + 1)
        return number, {n: expected(n, self.num_features) / number for n in degrees}

    def maps(self, scale: float) -> PhiMaps:
        """One map for both sides."""
        maclaurin = self.map
        columns = maclaurin.columns(self.directions, scale)

        def phi(x: Tensor) -> Tensor:
            return maclaurin(x, columns.to(x.dtype))

        return phi, phi


class StratifiedMap(_ProductMap):
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
        eye = torch.eye(head_dim).expand(num_kv_heads, -1, -1)
        self.register_buffer("q_basis", eye.clone())
        self.register_buffer("k_basis", eye.clone())
        self.register_buffer("q_centre", torch.zeros(num_kv_heads, head_dim))
        self.register_buffer("k_centre", torch.zeros(num_kv_heads, head_dim))
        if tail is None:
            self.set_(without_data(head_dim, num_kv_heads, counts), 1.0)
        else:
            self.resample_(generator)

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

    def maps(self, scale: float) -> PhiMaps:
        """The two maps, which differ in basis and centre."""
        of_q, of_k = (self._columns(basis, scale) for basis in (self.q_basis, self.k_basis))
        return self._phi(of_q, self.q_centre, None), self._phi(of_k, self.k_centre, scale)

    def _columns(self, basis: Tensor, scale: float) -> Tensor:
        columns = self.map.columns(basis @ self.directions, scale)
        first = self.map.counts_by_rank[0] if self.map.counts_by_rank else 0
        return torch.cat([columns[..., :first] * self.coefficients[:, None, :first], columns[..., first:]], dim=-1)

    def _phi(self, columns: Tensor, centre: Tensor, scale: float | None) -> Callable[[Tensor], Tensor]:
        maclaurin = self.map

        def phi(x: Tensor) -> Tensor:
            if not self.centred:
                return maclaurin(x, columns.to(x.dtype))
            x = x - grouped(centre[None], x.shape[1])[:, :, None].to(x.dtype)
            features = maclaurin(x, columns.to(x.dtype))
            return features if scale is None else features * self._weights(x, scale)

        return phi

    def _weights(self, centred: Tensor, scale: float) -> Tensor:
        exponent = scale * (centred @ self.q_centre[..., None].to(centred.dtype))
        if statistics.asked():
            statistics.count_clamped(exponent.detach().abs() > _MOST_EXPONENT)
        return exponent.clamp(-_MOST_EXPONENT, _MOST_EXPONENT).exp()
