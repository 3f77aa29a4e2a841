"""Causal attention, chunk by chunk: exact similarities within a chunk, everything before it read from the sums.

    out_i = post((A_i^T kv + sum_{j <= i} s_ij v_j) / (A_i^T z + sum_{j <= i} s_ij)),   s_ij = w_j A_i^T phi(k_j)

with A_i = weights x phi(q_i), kv and z the sums before the chunk, and j within it. The chunks of a block are rows of
the same matrix products: R = B h chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from .derive import Deriver
from .fill import Filler, Part
from .memory import block_tokens, like_queries
from .read import Finish, lifted, protected, root_of, widths_of
from .spec import Side, Spec
from .sums import computed_in, features_beside

CHUNK = 128
"""Tokens of a chunk: of the order of the features and the values, so that both ways cost about the same."""


class Problem(NamedTuple):
    """What both directions take.

    Args:
        q: (B, H, N, D).
        k: (B, Hk, N, D).
        v: (B, Hk, N, Dv).
        key_mask: (B, N) or None.
        weights: (H, F) of the products of features, or None for 1.
        kv: (B, Hk, F, Dv), the sums before the first token, without weights.
        z: (B, Hk, F).
        finish: its constants are not used: they follow from the last feature.
        query: the map of queries, a row per query head.
        key: the map of keys.
        query_spec: its numbers.
        key_spec: its numbers.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    weights: Tensor | None
    kv: Tensor
    z: Tensor
    finish: Finish
    query: Side
    key: Side
    query_spec: Spec
    key_spec: Spec


class Piece(NamedTuple):
    """A run of chunks of one length."""

    start: int
    chunks: int
    length: int

    @property
    def tokens(self) -> slice:
        """Its tokens."""
        return slice(self.start, self.start + self.chunks * self.length)


def pieces(length: int, chunks: int) -> list[Piece]:
    """Blocks of as many chunks as fit, the chunks that are left, and the tokens that are left."""
    found: list[Piece] = []
    start = 0
    while start < length:
        whole = min((length - start) // CHUNK, chunks)
        piece = Piece(start, whole, CHUNK) if whole else Piece(start, 1, length - start)
        found.append(piece)
        start = piece.tokens.stop
    return found


class Made(NamedTuple):
    """Features and values of a piece; see ``Chunks``."""

    queries: list[Part]
    plain: list[Part]
    keys: list[Part]
    spread: list[Part]
    values: Tensor
    own: Tensor
    weight: Tensor | None
    dropped: Tensor | None


@dataclass
class Chunks:
    """One piece, made: rows of queries (Rq, C, .) and of keys (Rk, C, .), Rq being a multiple of Rk.

    Attributes:
        queries: A, the weighted features of queries.
        plain: the features without weights.
        keys: features of keys, a row per key head.
        spread: the same, a row per query head.
        values: (Rk, C, Dv), times the weight of their key.
        own_values: (Rk, C, Dv), without the weight, 0 where masked.
        weight: (Rk, 1, C) or None.
        similarity: (Rq, C, C), s_ij without the weight of the key, 0 above the diagonal.
        weighted: s_ij.
        kv: per part, (Rq, F_i, Dv) before each chunk.
        z: per part, (Rq, 1, F_i).
        numerator: (Rq, C, Dv).
        denominator: (Rq, 1, C).
    """

    queries: list[Part]
    plain: list[Part]
    keys: list[Part]
    spread: list[Part]
    values: Tensor
    own_values: Tensor
    weight: Tensor | None
    dropped: Tensor | None
    similarity: Tensor
    weighted: Tensor
    kv: list[Tensor]
    z: list[Tensor]
    numerator: Tensor
    denominator: Tensor


class Walk:
    """Makes one piece after the other, with the sums that stand before it."""

    def __init__(
        self, problem: Problem, query_wanted: frozenset[str] | None, key_wanted: frozenset[str] | None
    ) -> None:
        q, k, v = problem.q, problem.k, problem.v
        self.problem = problem
        self.dtype = computed_in(q)
        self.wide = accumulation_dtype(self.dtype)
        self.like = q.new_empty(0, dtype=self.dtype)
        self.batch, self.heads, self.length, self.head_dim = q.shape
        self.key_heads = k.shape[1]
        self.groups = self.heads // self.key_heads
        projections = 0 if problem.key.projection is None else problem.key.projection.shape[-1]
        per_row = 2 * self.head_dim + 2 * v.shape[3] + projections + 2 * features_beside(problem.key_spec, projections)
        tokens = block_tokens(self.length, self.batch * self.heads * per_row * self.dtype.itemsize, q.device)
        self.pieces = pieces(self.length, max(tokens // CHUNK, 1))
        self.widths = widths_of(problem.key_spec, self.head_dim, problem.kv.shape[2])
        self.wanted = query_wanted, key_wanted
        self._fillers: dict[tuple[bool, int], Filler] = {}
        self._later: dict[int, Tensor] = {}
        self.kv = [x.clone() for x in problem.kv.flatten(0, 1).to(self.wide).split(self.widths, dim=1)]
        self.z = [x.clone() for x in problem.z.flatten(0, 1).to(self.wide).split(self.widths, dim=1)]
        weights = problem.weights
        self.weights = None if weights is None else weights.to(self.dtype).repeat(self.batch, 1)

    def filler(self, key: bool, chunks: int) -> Filler:
        """The one for pieces of that many chunks."""
        found = self._fillers.get((key, chunks))
        if found is None:
            problem = self.problem
            side, spec = (problem.key, problem.key_spec) if key else (problem.query, problem.query_spec)
            wanted = self.wanted[key]
            rows = (spec, side, self.batch, self.like)
            if wanted is None:
                found = Filler(*rows, key=key, chunks=chunks)
            else:
                found = Deriver(*rows, key=key, chunks=chunks, wanted=wanted)
            self._fillers[(key, chunks)] = found
        return found

    def close(self) -> None:
        """Give all memory back."""
        for filler in self._fillers.values():
            filler.close()

    def derivers(self, key: bool) -> Iterator[Deriver]:
        """All that were made of one side."""
        return (f for (of_key, _), f in self._fillers.items() if of_key == key and isinstance(f, Deriver))

    def rows(self, x: Tensor, piece: Piece) -> Tensor:
        """(B, h, N, W) -> (B h chunks, C, W)."""
        block = x[:, :, piece.tokens]
        return block.unflatten(2, (piece.chunks, piece.length)).flatten(0, 2).to(self.dtype)

    def back(self, x: Tensor, like: Tensor, piece: Piece) -> Tensor:
        """(B h chunks, C, W) -> (B, h, n, W) of the heads of ``like``."""
        return x.view(self.batch, like.shape[1], piece.chunks * piece.length, x.shape[-1])

    def spread(self, x: Tensor, chunks: int) -> Tensor:
        """(Rk, ...) -> (Rq, ...)."""
        if self.groups == 1:
            return x
        return x.unflatten(0, (-1, chunks)).repeat_interleave(self.groups, dim=0).flatten(0, 1)

    def gathered(self, x: Tensor, chunks: int) -> Tensor:
        """(Rq, ...) -> (Rk, ...), summed over the heads of a group."""
        if self.groups == 1:
            return x
        return x.unflatten(0, (-1, self.groups, chunks)).sum(1).flatten(0, 1)

    def later(self, length: int) -> Tensor:
        """1 on and below the diagonal."""
        found = self._later.get(length)
        if found is None:
            found = self._later[length] = torch.ones(length, length, dtype=self.dtype, device=self.like.device).tril_()
        return found

    def earlier(self, chunks: int) -> Tensor:
        """1 below the diagonal."""
        return self.later(chunks) - torch.eye(chunks, dtype=self.dtype, device=self.like.device)

    def features(self, piece: Piece) -> Made:
        """The features of one piece."""
        problem, chunks = self.problem, piece.chunks
        query, key = self.filler(False, chunks), self.filler(True, chunks)
        x, v = self.rows(problem.k, piece), self.rows(problem.v, piece)
        dropped = None
        if problem.key_mask is not None:
            mask = problem.key_mask[:, None, piece.tokens].expand(-1, self.key_heads, -1)
            dropped = ~mask.unflatten(2, (chunks, piece.length)).flatten(0, 2)[:, None]
            x, v = x.masked_fill(dropped.mT, 0.0), v.masked_fill(dropped.mT, 0.0)
        keys = key.fill(key.prepare(x))
        weight = key.weight
        if dropped is not None:
            kept = (~dropped).to(x.dtype)
            weight = kept if weight is None else weight * kept
        plain = query.fill(query.prepare(self.rows(problem.q, piece)))
        queries = [self._weighted(part, i, query, chunks) for i, part in enumerate(plain)]
        spread = keys if self.groups == 1 else [Part(self.spread(p.data, chunks), p.tokens_last) for p in keys]
        values = v if key.weight is None else v * weight.mT  # pyright: ignore[reportOptionalMemberAccess]
        return Made(queries, plain, keys, spread, values, v, weight, dropped)

    def _weighted(self, part: Part, i: int, query: Filler, chunks: int) -> Part:
        if self.weights is None:
            return part
        start = sum(self.widths[:i])
        rows = self.weights[:, start : start + self.widths[i]].repeat_interleave(chunks, dim=0)
        rows = rows[:, :, None] if part.tokens_last else rows[:, None]
        return Part(
            torch.mul(part.data, rows, out=query.buffers.take(f"weighted{i}", *part.data.shape)), part.tokens_last
        )

    def make(self, piece: Piece) -> Chunks:
        """One piece; moves the sums behind it."""
        queries, plain, keys, spread, values, own, weight, dropped = self.features(piece)
        chunks, query = piece.chunks, self.filler(False, piece.chunks)
        similarity = query.buffers.take("similarity", queries[0].by_feature.shape[0], piece.length, piece.length)
        for i, (a, b) in enumerate(zip(queries, spread, strict=True)):
            if i:
                torch.baddbmm(similarity, a.by_feature.mT, b.by_feature, out=similarity)
            else:
                torch.bmm(a.by_feature.mT, b.by_feature, out=similarity)
        similarity.mul_(self.later(piece.length))
        weighted = similarity
        if weight is not None:
            weighted = similarity * self.spread(weight, chunks)
        own_rows = self.spread(own, chunks)
        numerator = torch.bmm(weighted, own_rows, out=query.buffers.take("out", *own_rows.shape))
        denominator = weighted.sum(-1)[:, None]
        before_kv, before_z = self.advance(keys, values, weight, chunks)
        for a, kv, z in zip(queries, before_kv, before_z, strict=True):
            torch.baddbmm(numerator, a.by_feature.mT, kv, out=numerator)
            torch.baddbmm(denominator, z, a.by_feature, out=denominator)
        return Chunks(
            queries,
            plain,
            keys,
            spread,
            values,
            own,
            weight,
            dropped,
            similarity,
            weighted,
            before_kv,
            before_z,
            numerator,
            denominator,
        )

    def advance(
        self, keys: list[Part], values: Tensor, weight: Tensor | None, chunks: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The sums before each chunk of a piece, a row per query head; the sums go on behind it."""
        before_kv: list[Tensor] = []
        before_z: list[Tensor] = []
        take = self.filler(True, chunks).buffers.take
        for i, part in enumerate(keys):
            phi = part.by_feature
            of_chunk = torch.bmm(phi, values, out=take(f"of_chunk{i}", len(phi), phi.shape[1], values.shape[2]))
            of_z = part.data.sum(part.tokens) if weight is None else torch.bmm(phi, weight.mT)[..., 0]
            before = take(f"before{i}", *of_chunk.shape)
            before_of_z = torch.empty_like(of_z)
            for total, steps, place in ((self.kv[i], of_chunk, before), (self.z[i], of_z, before_of_z)):
                rows = (len(total), chunks, -1)
                _running(total.view(len(total), -1), steps.view(rows), place.view(rows), self.earlier(chunks))
            before_kv.append(self.spread(before, chunks))
            before_z.append(self.spread(before_of_z, chunks)[:, None])
        return before_kv, before_z

    def constants(self, made: Chunks, piece: Piece, *, weighted: bool = True) -> tuple[Tensor, Tensor]:
        """What the constant feature alone gives numerators (Rq, C, Dv) and denominators (Rq, C, 1)."""
        ones, weight = self.later(piece.length), made.weight
        kv = made.kv[-1][:, -1:] + ones @ self.spread(made.values, piece.chunks)
        seen = ones.sum(-1, keepdim=True)[None] if weight is None else ones @ self.spread(weight, piece.chunks).mT
        z = made.z[-1][:, :, -1:] + seen
        if not weighted:
            return kv, z
        factor = made.queries[-1].by_feature[:, -1, :, None]
        return factor * kv, factor * z

    def settled(self, made: Chunks, piece: Piece) -> Finish:
        """What finishes this piece, as rows."""
        finish = self.problem.finish
        kv = z = None
        if finish.floor:
            kv, z = self.constants(made, piece)
        gamma, beta = (
            None if x is None else x.to(self.dtype).repeat(self.batch).repeat_interleave(piece.chunks)[:, None, None]
            for x in (finish.gamma, finish.beta)
        )
        return Finish(finish.floor, kv, z, gamma, beta)

    def safe(self, made: Chunks) -> Tensor:
        """Denominators (Rq, 1, C) under the policy of ``core.contract``."""
        denominator = made.denominator
        limits = torch.finfo(self.dtype)
        if denominator.device.type == "cpu":
            # the norms of a chunk cost little, and are more than those of any of its rows
            of_queries = torch.stack([_norms(part.data) for part in made.queries]).square().sum(0)
            of_sums = torch.stack([_norms(z) for z in made.z]).square().sum(0)
            within = _norms(made.weighted) * math.sqrt(made.weighted.shape[-1])
            most = (of_queries * of_sums).sqrt() + within
            least = (most * (8 * limits.eps)).clamp_min(limits.tiny)
            if bool((denominator.abs().amin((1, 2)) > least).all()):
                return denominator
        magnitude = made.weighted.abs().sum(-1)[:, None]
        for part, z in zip(made.queries, made.z, strict=True):
            magnitude = magnitude + z.abs() @ part.by_feature.abs()
        return protected(denominator, magnitude)


def _norms(x: Tensor) -> Tensor:
    """Norm of each row (R, ., .) -> (R,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=-1)


def _running(total: Tensor, steps: Tensor, before: Tensor, earlier: Tensor) -> None:
    """Adds steps (R, chunks, W) to total (R, W); ``before`` gets what it was before each.

    As a product with ``earlier`` (chunks, chunks), 1 below the diagonal: two calls, however many chunks.
    """
    start = total[:, None].to(steps.dtype)
    torch.baddbmm(start, earlier.expand(len(steps), -1, -1), steps, out=before)
    total.add_(steps.sum(1, dtype=total.dtype))


def causal(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Out (B, H, N, Dv) of this dtype, and the sums kv and z after the last token."""
    q, v = problem.q, problem.v
    walk = Walk(problem, None, None)
    out = like_queries(q, v.shape[3], dtype)
    for piece in walk.pieces:
        made = walk.make(piece)
        finish = walk.settled(made, piece)
        numerator, denominator = made.numerator, walk.safe(made).mT
        if finish.constant_z is not None:
            numerator, denominator = lifted(numerator, denominator, finish)[:2]
        place = out[:, :, piece.tokens].unflatten(2, (piece.chunks, piece.length))
        shape = place.shape[:-1]
        if finish.beta is None or finish.gamma is None:
            torch.div(numerator.view(*shape, -1), denominator.reshape(*shape, 1), out=place)
        else:
            x = numerator.div_(denominator)
            place.copy_(root_of(x, finish.beta).mul_(x).mul_(finish.gamma).view(*shape, -1))
    walk.close()
    shape = problem.kv.shape[:2]
    return out, torch.cat(walk.kv, dim=1).unflatten(0, shape), torch.cat(walk.z, dim=1).unflatten(0, shape)
