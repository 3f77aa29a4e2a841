"""Features of one block of tokens, written into buffers that stay in the cache, and their derivatives.

Rows are batch x heads. In memory the tokens of a feature stand together where features are made of projections, so that
products and sums run over long rows; where a feature is a function of one entry of x, it stands where x stands.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..norms import EPS
from .buffers import Buffers
from .kept import fingerprint
from .spec import MOST_EXPONENT, Side, Spec


@dataclass
class Part:
    """Some features of a block: data (R, F, n) if ``tokens_last``, else (R, n, F)."""

    data: Tensor
    tokens_last: bool

    @property
    def by_feature(self) -> Tensor:
        """(R, F, n)."""
        return self.data if self.tokens_last else self.data.mT

    def along(self, other: Tensor) -> Tensor:
        """A row (R, 1, n) of tokens in the layout of the data."""
        return other if self.tokens_last else other.mT

    @property
    def tokens(self) -> int:
        """The dimension of the tokens."""
        return -1 if self.tokens_last else -2


@dataclass(frozen=True)
class Layout:
    """The tensors of a side as a block needs them.

    Attributes:
        side: with R = B h rows, in the dtype of the block.
        matrix: (R, P, D) that x is multiplied with, an entry of value 1 for constants included; None without one.
        offset: (R, P, 1), or None.
        index: per rank, the rows of u (R P, n) that its factors are; constants follow those of rank 1.
    """

    side: Side
    matrix: Tensor | None = None
    offset: Tensor | None = None
    index: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def size(self) -> int:
        """Bytes, about: those of the given tensors count twice."""
        held = [x for x in (*self.side, *self.side, self.matrix, *self.index) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)


_LAYOUTS: OrderedDict[tuple[Any, ...], tuple[Side, Layout]] = OrderedDict()
_MOST_BYTES = 1 << 25  # of all layouts that are kept


def layout_of(spec: Spec, side: Side, batch: int, like: Tensor, chunks: int = 1, beside: bool = False) -> Layout:
    """The layout of a side, kept for the next call with the same tensors."""
    if all(x is None for x in side):
        return Layout(side)
    key = (spec, batch, chunks, beside, like.dtype, like.device, *map(fingerprint, side))
    found = _LAYOUTS.get(key)
    if found is not None:
        return found[1]
    made = _lay_out(spec, side, batch, like, chunks, beside)
    _LAYOUTS[key] = side, made  # the tensors too, so that their ids stay theirs
    while len(_LAYOUTS) > 1 and sum(layout.size for _, layout in _LAYOUTS.values()) > _MOST_BYTES:
        _LAYOUTS.popitem(last=False)
    return made


def _lay_out(spec: Spec, side: Side, batch: int, like: Tensor, chunks: int, beside: bool) -> Layout:
    side = Side(*(_rows(x, batch, like, chunks) for x in side))
    if side.projection is None:
        return Layout(side)
    num, width = side.projection.shape[0], side.projection.shape[-1]
    matrix, offset, index = side.projection.mT, side.offset, list[Tensor]()
    constants = spec.constants if spec.ranks else 0
    if constants and spec.gathered:
        offset = like.new_zeros(num, width) if offset is None else offset
        matrix = torch.cat([matrix, like.new_zeros(num, 1, matrix.shape[-1])], dim=1)
        offset = torch.cat([offset, like.new_ones(num, 1)], dim=1)
    if beside:
        matrix = torch.cat([matrix, like.new_zeros(num, 1, matrix.shape[-1])], dim=1)
        offset = None if offset is None else torch.cat([offset, like.new_zeros(num, 1)], dim=1)
    if spec.ranks and spec.gathered:
        assert side.index is not None
        start = (torch.arange(num, device=like.device) * matrix.shape[1])[:, None]
        ranks = list(side.index.split(spec.ranks, dim=-1))
        if constants:
            ranks[0] = torch.cat([ranks[0], ranks[0].new_full((num, constants), width)], dim=-1)
        index = [(rank + start).flatten() for rank in ranks]
    return Layout(side, matrix.contiguous(), None if offset is None else offset[:, :, None], index)


class Filler:
    """Makes the features of one block after the other, and carries derivatives back through them.

    Args:
        spec: what they are.
        side: its tensors, a row per head.
        batch: B; there are R = B h rows.
        like: gives dtype and device of everything.
        key: whether x are keys.
        keeps: whether ``backward`` will be called.
        log_scale: (R, F), added to the logarithms of queries.
        beside: (R, D), whose inner product with the prepared x is left in ``beside`` after each block.
        chunks: rows that follow each other are of one head; R = B h chunks.
    """

    def __init__(
        self,
        spec: Spec,
        side: Side,
        batch: int,
        like: Tensor,
        *,
        key: bool,
        keeps: bool = False,
        log_scale: Tensor | None = None,
        beside: Tensor | None = None,
        chunks: int = 1,
    ) -> None:
        self.spec = spec
        self.key = key
        self.keeps = keeps
        self.buffers = Buffers(like.dtype, like.device)
        self.beside: Tensor | None = None
        self.weight: Tensor | None = None
        self.clamped: Tensor | None = None
        self._log_scale = None if log_scale is None else log_scale.to(like.dtype)[:, :, None]
        layout = layout_of(spec, side, batch, like, chunks, beside is not None)
        self._side = layout.side
        self._matrix, self._offset, self._index = layout.matrix, layout.offset, layout.index
        self._beside_at = -1
        if beside is not None:
            # one entry of u more, for which the layout has left room
            self._matrix = beside[:, None] if self._matrix is None else self._matrix.clone()
            self._matrix[:, -1] = beside
            self._beside_at = self._matrix.shape[1] - 1
        self._norms: Tensor | None = None
        self._x: Tensor | None = None
        self._u: Tensor | None = None
        self._prefixes: list[Tensor] = []
        self._factors: list[Tensor] = []

    def close(self) -> None:
        """Give the memory back; nothing that this has made may be used afterwards."""
        self.buffers.close()

    def prepare(self, x: Tensor) -> Tensor:
        """x (R, n, D) of any floating dtype, normalised and shifted, in the dtype of the block."""
        spec, side = self.spec, self._side
        if spec.norm == "" and side.shift is None:
            return x
        y = self.buffers.take("x", *x.shape)
        if spec.norm:
            if spec.norm == "token":
                torch.sub(x, x.mean(-1, keepdim=True), out=y)
                x = y
            elif spec.norm == "batch":
                assert side.mean is not None
                assert side.variance is not None
                torch.sub(x, side.mean[:, None], out=y).mul_((side.variance + EPS).rsqrt()[:, None])
                x = y
            norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(EPS)
            torch.div(x, norms, out=y)
            self._norms = norms
            x = y
        if side.shift is not None:
            torch.sub(x, side.shift[:, None], out=y)
        return y

    def fill(self, x: Tensor) -> list[Part]:
        """The features of prepared x (R, n, D); logarithms in the log domain."""
        spec = self.spec
        self._x = x
        if spec.family == "product":
            return self._product(x)
        if spec.family == "elu":
            return [Part(self._elu(x), False)]
        if spec.family in ("softmax", "identity"):
            if spec.scale != 1.0:
                x = torch.mul(x, spec.scale, out=self.buffers.take("phi", *x.shape))
            return [Part(x, False)]
        u = self._projected(x)
        if spec.family == "positive":
            return [Part(u, True)]
        half = u.shape[1]
        phi = self.buffers.take("phi", u.shape[0], 2 * half, u.shape[2])
        torch.sin(u, out=phi[:, :half])
        torch.cos(u, out=phi[:, half:])
        return [Part(phi, True)]

    def as_given(self, parts: list[Part], x: Tensor) -> list[Part]:
        """The parts with x (B, h, n, D) itself, in its own dtype, where its entries are features as they are."""
        if not self.spec.linear or self.spec.norm or self._side.shift is not None:
            return parts
        return [Part(x.flatten(0, 1), False), *parts[1:]]

    def exponentiate(self, part: Part, top: Tensor) -> Part:
        """exp(part - top), in the part's own memory where that is not x."""
        own = part.tokens_last or self.spec.scale != 1.0
        out = part.data if own else self.buffers.take("phi", *part.data.shape)
        return Part(torch.sub(part.data, top, out=out).exp_(), part.tokens_last)

    def _projected(self, x: Tensor) -> Tensor:
        assert self._matrix is not None
        u = self.buffers.take("u", x.shape[0], self._matrix.shape[1], x.shape[1])
        added = self._offset
        if self.spec.family == "positive":
            # of queries, what is the same for all features cancels
            added = self._log_scale
            if self.key:
                square = torch.linalg.vector_norm(x, dim=-1).square_().mul_(-0.5 * self.spec.scale)
                added = square.sub_(0.5 * math.log(self._matrix.shape[1]))[:, None]
        if added is None:
            return torch.bmm(self._matrix, x.mT, out=u)
        return torch.baddbmm(added, self._matrix, x.mT, out=u)

    def _product(self, x: Tensor) -> list[Part]:
        spec, parts = self.spec, list[Part]()
        if self._matrix is None:
            self._u = None
        else:
            self._u = u = self._projected(x)
            if self._beside_at >= 0:
                self.beside = u[:, self._beside_at, None]
            if spec.weighted and self.key:
                log_weight = u[:, self._side.projection.shape[-1] - 1, None]  # pyright: ignore[reportOptionalMemberAccess]
                self.weight = log_weight.clamp(-MOST_EXPONENT, MOST_EXPONENT).exp_()
                self.clamped = log_weight.abs() > MOST_EXPONENT if self.keeps else None
        if spec.linear:
            parts.append(Part(x, False))
        if spec.ranks and self._u is not None:
            parts.append(Part(self._multiplied(self._u), True))
        elif spec.constants:
            ones = self.buffers.take("ones", x.shape[0], spec.constants, x.shape[1])
            parts.append(Part(ones.fill_(1.0), True))
        return parts

    def _multiplied(self, u: Tensor) -> Tensor:
        spec, tokens = self.spec, u.shape[-1]
        self._prefixes, self._factors = [], []
        if not spec.gathered:
            phi, start = u[:, : spec.products], spec.products
            if spec.constants:
                phi[:, spec.ranks[0] :].fill_(1.0)
            if self.keeps:
                phi = self.buffers.take("phi", *phi.shape).copy_(phi)
        else:
            phi = self.buffers.take("phi", u.shape[0], spec.products, tokens)
            start = 0
            torch.index_select(u.view(-1, tokens), 0, self._index[0], out=phi.view(-1, tokens))
        for rank, count in enumerate(spec.ranks[1:], start=1):
            if spec.gathered:
                factor = self.buffers.take(f"factor{rank if self.keeps else ''}", u.shape[0], count, tokens)
                torch.index_select(u.view(-1, tokens), 0, self._index[rank], out=factor.view(-1, tokens))
            else:
                factor = u[:, start : start + count]
                start += count
            if self.keeps:
                kept = self.buffers.take(f"prefix{rank}", u.shape[0], count, tokens)
                self._prefixes.append(kept.copy_(phi[:, :count]))
                self._factors.append(factor)
            phi[:, :count].mul_(factor)
        return phi

    def _elu(self, x: Tensor) -> Tensor:
        # elu(x) + 1 = max(1 + x, exp(min(x, 0))), two exponentials less than torch's own
        phi, line = self.buffers.take("phi", *x.shape), self.buffers.take("line", *x.shape)
        if self.spec.scale != 1.0:
            x = torch.mul(x, self.spec.scale, out=line)
        torch.clamp(x, max=0.0, out=phi).exp_()
        torch.add(x, 1.0, out=line)
        return torch.maximum(phi, line, out=phi)


def _rows(x: Tensor | None, batch: int, like: Tensor, chunks: int) -> Tensor | None:
    if x is None:
        return None
    x = x.to(like.dtype) if x.is_floating_point() else x
    x = x.repeat(batch, *(1,) * (x.dim() - 1)) if batch > 1 else x
    return x.repeat_interleave(chunks, dim=0) if chunks > 1 else x
