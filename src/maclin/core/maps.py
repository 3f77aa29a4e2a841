"""Maclaurin feature maps as modules: what is drawn or chosen lies in buffers, one set per key head.

Each has ``num_features``, ``num_projections`` and ``maps(scale)``, which returns the maps of blocks of q (B, H, n, D)
and of k (B, Hk, n, D), both normalised already but not scaled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .design import Basis
from .fast.maps import Maps
from .fast.spec import Side, Spec
from .features import DEGREE_LAWS, PUBLISHED_MAX_DEGREE, RandomMaclaurin, rademacher
from .kernels import Kernel
from .norms import WideBuffers
from .stratified import plain_basis


def first_order_maps(kernel: Kernel, scale: float, num_kv_heads: int, head_dim: int) -> Maps:
    """phi(x) = [sqrt(a_1 scale) x, sqrt(a_0)] on both sides, so <phi(x), phi(y)> = a_0 + a_1 scale <x, y>."""
    spec = Spec("product", constants=1, linear=True)
    constant, slope = math.sqrt(kernel.coefficient(0)), math.sqrt(kernel.coefficient(1) * scale)
    weights = torch.tensor([slope] * head_dim + [constant], dtype=torch.float64).expand(num_kv_heads, -1)
    return Maps(spec, spec, q_weights=weights, k_weights=weights)


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
    def maps(self, scale: float) -> Maps:
        """The maps of q and k for this scale of <q, k>."""

    @property
    @abstractmethod
    def powers(self) -> tuple[int, ...]:
        """The degree of each feature, as ``maps`` orders them."""

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

    @property
    def powers(self) -> tuple[int, ...]:
        """The vector itself, then the constant."""
        return (*(1,) * self.head_dim, 0)

    def maps(self, scale: float) -> Maps:
        """See ``first_order_maps``."""
        return first_order_maps(self.kernel, scale, self.num_kv_heads, self.head_dim)


class ProductMap(MaclaurinMap):
    """Features that are products of projections; the degrees of some may be drawn, and with them the shapes."""

    degrees: Tensor
    directions: Tensor
    map: RandomMaclaurin

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

    @property
    def powers(self) -> tuple[int, ...]:
        """Descending."""
        return self.map.degrees

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


class DrawnMap(ProductMap):
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

    def maps(self, scale: float) -> Maps:
        """See ``maclaurin_maps``."""
        return maclaurin_maps(self.map, self.directions, scale)


def maclaurin_maps(maclaurin: RandomMaclaurin, directions: Tensor, scale: float) -> Maps:
    """The features of ``RandomMaclaurin`` with directions (Hk, D, sum of degrees), for vectors times scale^(1/2).

    One map for both sides.
    """
    spec, side = by_rank(maclaurin), Side(maclaurin.columns(directions, scale))
    first = spec.ranks[0] if spec.ranks else 0
    values = [1.0] * first + list(maclaurin.weights[first:])
    weights = torch.tensor(values, dtype=torch.float64, device=directions.device).expand(len(directions), -1)
    return Maps(spec, spec, side, side, weights, weights)


def by_rank(maclaurin: RandomMaclaurin) -> Spec:
    """Of features whose columns ``RandomMaclaurin.columns`` lays out."""
    ranks = tuple(maclaurin.counts_by_rank)
    return Spec("product", ranks=ranks, constants=len(maclaurin.degrees) - (ranks[0] if ranks else 0))
