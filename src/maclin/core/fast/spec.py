"""What a feature map is, as numbers and flat tensors: a frozen specification and the tensors of each side.

Custom operators take tensors and numbers only, so a map travels through them as ``Spec.code`` beside the tensors of a
``Side``. The families, of x prepared (normalised, shifted) and u = projection^T x + offset:

    product    products of entries of u: the entries of rank 1, times those of rank 2 where there are any, and so on;
               before them, if ``linear``, x itself; u may end in the logarithm of a weight of the key
    positive   exp(u - scale |x|^2 / 2) / sqrt(P), as a logarithm
    fourier    [sin u, cos u]
    elu        elu(scale x) + 1
    softmax    exp(scale x), as a logarithm; of queries over the sum of the row
    identity   scale x

``features`` is the plain form: any device, differentiable by autograd, and what the blocked form is tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import grouped
from ..features import elu_features
from ..norms import batch_standardise, token_standardise, unit_norm

MOST_EXPONENT = 60.0
"""Of a key's weight: float32 holds exp(60) times the sums over it."""


@dataclass(frozen=True)
class Spec:
    """A family of features with its numbers.

    Args:
        family: see the module.
        norm: of x, before anything else: "", "unit", "token" (ppSBN with statistics of each vector) or "batch".
        scale: factor of x, or of |x|^2, where the family has one.
        ranks: of "product": how many features have at least 1, 2, ... factors.
        constants: of "product": features of value 1 that follow, where u is laid out by rank; their columns of u are 0.
        gathered: of "product": an index names the factors in u; otherwise u holds the factors of rank 1, the
            constants, and then those of every further rank.
        linear: of "product": x itself is features too, before the others.
        weighted: of "product": the last entry of u is the logarithm of the key's weight.
    """

    family: str
    norm: str = ""
    scale: float = 1.0
    ranks: tuple[int, ...] = ()
    constants: int = 0
    gathered: bool = False
    linear: bool = False
    weighted: bool = False

    @property
    def code(self) -> str:
        """As a string that ``spec_of`` reads."""
        flags = f"{self.constants:d} {self.gathered:d} {self.linear:d} {self.weighted:d}"
        ranks = " ".join([str(count) for count in self.ranks])
        return f"{self.family}|{self.norm}|{self.scale!r}|{flags}|{ranks}"

    @property
    def log_domain(self) -> bool:
        """Whether features are handed over as logarithms."""
        return self.family in ("positive", "softmax")

    @property
    def products(self) -> int:
        """Features of "product" beside the linear ones."""
        return (self.ranks[0] if self.ranks else 0) + self.constants


@lru_cache(maxsize=1024)
def spec_of(code: str) -> Spec:
    """What ``Spec.code`` wrote."""
    family, norm, scale, flags, ranks = code.split("|")
    constants, gathered, linear, weighted = (int(x) for x in flags.split())
    counts = tuple(int(x) for x in ranks.split())
    return Spec(family, norm, float(scale), counts, constants, bool(gathered), bool(linear), bool(weighted))


class Side(NamedTuple):
    """The tensors of the map of queries, or of keys; each has a row per head of x.

    Args:
        projection: (h, D, P).
        offset: (h, P).
        index: (h, sum of ranks) rows of u, rank by rank, where ``gathered``.
        shift: (h, D), subtracted after the normalisation.
        mean: (h, D) of the "batch" norm.
        variance: (h, D) of the "batch" norm.
    """

    projection: Tensor | None = None
    offset: Tensor | None = None
    index: Tensor | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    shift: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None

    def for_heads(self, heads: int) -> Side:
        """With a row for each of ``heads`` query heads; those of a group share the row of their key head."""
        return Side(*(x if x is None or len(x) == heads else grouped(x[None], heads)[0] for x in self))

    def to(self, dtype: torch.dtype) -> Side:
        """With floating tensors of this dtype."""
        return Side(*(x if x is None or not x.is_floating_point() else x.to(dtype) for x in self))


def prepared(spec: Spec, side: Side, x: Tensor) -> Tensor:
    """x (B, h, n, D), normalised and shifted."""
    if spec.norm == "unit":
        x = unit_norm(x)
    elif spec.norm == "token":
        x = token_standardise(x)
    elif spec.norm == "batch":
        assert side.mean is not None
        assert side.variance is not None
        x = batch_standardise(x, side.mean, side.variance)
    return x if side.shift is None else x - side.shift[:, None].to(x.dtype)


def features(spec: Spec, side: Side, x: Tensor, of_keys: bool = True) -> Tensor:
    """Features (B, h, n, F) of x (B, h, n, D), or their logarithms; those of keys with their weight."""
    x = prepared(spec, side, x)
    if spec.family == "product":
        return _products(spec, side, x, of_keys)
    if spec.family == "elu":
        return elu_features(x * spec.scale)
    if spec.family == "identity":
        return x * spec.scale
    if spec.family == "softmax":
        return x * spec.scale if of_keys else torch.log_softmax(x * spec.scale, dim=-1)
    u = projected(side, x)
    if spec.family == "fourier":
        return torch.cat([u.sin(), u.cos()], dim=-1)
    return u - ((0.5 * spec.scale) * (x * x).sum(-1, keepdim=True) + 0.5 * math.log(u.shape[-1]))


def projected(side: Side, x: Tensor) -> Tensor:
    """u (B, h, n, P)."""
    assert side.projection is not None
    u = x @ side.projection.to(x.dtype)
    return u if side.offset is None else u + side.offset[:, None].to(x.dtype)


def log_weights(spec: Spec, side: Side, x: Tensor) -> Tensor:
    """Logarithms (B, h, n) of the weights of keys x, before they are cut at ``MOST_EXPONENT``."""
    return projected(side, prepared(spec, side, x))[..., -1]


def _products(spec: Spec, side: Side, x: Tensor, of_keys: bool) -> Tensor:
    parts = [x] if spec.linear else list[Tensor]()
    weight: Tensor | None = None
    if side.projection is not None:
        u = projected(side, x)
        if spec.weighted:
            weight = u[..., -1:].clamp(-MOST_EXPONENT, MOST_EXPONENT).exp()
        if spec.ranks:
            product, *higher = factors(spec, side, u)
            for rank in higher:
                more = rank.shape[-1]
                product = torch.cat([product[..., :more] * rank, product[..., more:]], dim=-1)
            parts.append(product)
    if spec.constants:
        parts.append(x.new_ones(1).expand(*x.shape[:-1], spec.constants))
    whole = torch.cat(parts, dim=-1)
    return whole if weight is None or not of_keys else whole * weight


def factors(spec: Spec, side: Side, u: Tensor) -> list[Tensor]:
    """The factors of each rank, (B, h, n, count), from u (B, h, n, P)."""
    if not spec.gathered:
        sizes = (*spec.ranks[:1], spec.constants, *spec.ranks[1:])
        first, _, *rest = u[..., : sum(sizes)].split(sizes, dim=-1)
        return [first, *rest]
    assert side.index is not None
    shape = (*u.shape[:-1], side.index.shape[-1])
    taken = u.gather(-1, side.index[:, None].expand(shape))
    return list(taken.split(spec.ranks, dim=-1))
