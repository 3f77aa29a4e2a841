"""From the specification of a feature map, ``core.fast.spec``, to what the kernels take."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..fast.spec import Side, Spec
from . import NoKernelError
from .device import POSITIVE, PRODUCTS
from .launch import FeatureMap
from .products import MOST_RANKS
from .softmax import softmax


def feature_map(
    spec: Spec,
    side: Side,
    head_dim: int,
    heads: int,
    weights: Tensor | None = None,  # (heads, M), factors of the features; None for 1
) -> FeatureMap:
    """The kernels' form of one side of a map, a row per head; of "softmax" for keys and queries alike.

    A map with a row per query head reads sums that are repeated for its heads. What comes before the features, a norm,
    is the caller's; make the map once and keep it.

    Raises:
        NoKernelError: a family, norm or offset that no kernel has, or tensors that learn.
    """
    if spec.family not in ("product", "positive", "softmax"):
        raise NoKernelError(f"features {spec.family!r}")
    if spec.norm or side.offset is not None:
        raise NoKernelError(f"features of x with {f'norm {spec.norm!r}' if spec.norm else 'an offset'}")
    given = [x for x in (side.projection, side.shift, weights) if x is not None]
    if any(x.requires_grad for x in given):
        raise NoKernelError("features that learn")
    centre = None if side.shift is None else side.shift.float().contiguous()
    if spec.family == "softmax":
        return softmax(head_dim, spec.scale)
    if spec.family == "positive":
        assert side.projection is not None
        m = side.projection.shape[-1]
        w = side.projection.float()[:, None].contiguous()
        return FeatureMap(POSITIVE, m, w, centre=centre, square=spec.scale, offset=0.5 * math.log(m))
    return _products(spec, side, head_dim, heads, weights, centre)


def _products(
    spec: Spec, side: Side, head_dim: int, heads: int, weights: Tensor | None, centre: Tensor | None
) -> FeatureMap:
    device = next((x.device for x in (side.projection, weights) if x is not None), torch.device("cpu"))
    first = head_dim if spec.linear else 0
    m = first + spec.products
    ranks = max(1, len(spec.ranks))
    if ranks > MOST_RANKS:
        raise NoKernelError(f"a feature of degree {ranks}: kernels take at most {MOST_RANKS}")
    w = torch.zeros(heads, ranks, head_dim, m, device=device)
    degrees = torch.zeros(m, dtype=torch.int32)
    if spec.linear:
        w[:, 0, :, :first] = torch.eye(head_dim, device=device)
        degrees[:first] = 1
    for rank, columns in enumerate(_columns_by_rank(spec, side)):
        w[:, rank, :, first : first + columns.shape[-1]] = columns.float()
        degrees[first : first + columns.shape[-1]] += 1
    coefficients = torch.ones(heads, m, device=device) if weights is None else weights.float().expand(heads, m)
    weight = None
    if spec.weighted:
        assert side.projection is not None
        weight = side.projection[..., -1].float().contiguous()
    return FeatureMap(PRODUCTS, m, w, degrees.to(device), coefficients.contiguous(), centre, weight)


def _columns_by_rank(spec: Spec, side: Side) -> list[Tensor]:
    """The projections of each rank, (heads, D, count)."""
    if not spec.ranks:
        return []
    assert side.projection is not None
    if spec.gathered:
        assert side.index is not None
        index = side.index[:, None].expand(-1, side.projection.shape[1], -1)
        return list(side.projection.gather(-1, index).split(spec.ranks, dim=-1))
    sizes = (spec.ranks[0], spec.constants, *spec.ranks[1:])
    first, _, *rest = side.projection[..., : sum(sizes)].split(sizes, dim=-1)
    return [first, *rest]
