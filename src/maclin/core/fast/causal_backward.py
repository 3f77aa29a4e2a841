"""The derivative of causal attention: forwards for queries, backwards for keys; every piece is made again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .causal import Chunks, Piece, Problem, Walk
from .derive import Deriver
from .read import Settled
from .spec import Side


class CausalDerivatives(NamedTuple):
    """Of everything that ``causal`` takes; None where there was none or it was not wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None
    kv: Tensor
    z: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    query: Side
    key: Side


def causal_backward(
    d: Tensor,  # (B, H, N, Dv)
    dkv: Tensor,  # (B, Hk, F, Dv), of the sums after the last token
    dz: Tensor,  # (B, Hk, F)
    problem: Problem,
    query_wanted: frozenset[str],
    key_wanted: frozenset[str],
) -> CausalDerivatives:
    """Derivatives from those of out and of the last sums; guarded denominators are taken as constant."""
    queries = _Queries(d, problem, query_wanted)
    keys = _Keys(queries, dkv, dz, problem, key_wanted)
    shape = problem.kv.shape[:2]
    queries.walk.close()
    keys.walk.close()
    gamma, beta = queries.settled.derivatives(problem.q.shape[0])
    return CausalDerivatives(
        queries.dq,
        keys.dk,
        keys.dv,
        None if queries.of_weights is None else queries.of_weights.unflatten(0, (problem.q.shape[0], -1)).sum(0),
        torch.cat(keys.dkv, dim=1).unflatten(0, shape),
        torch.cat(keys.dz, dim=1).unflatten(0, shape),
        gamma,
        beta,
        _side(queries.walk, False),
        _side(keys.walk, True),
    )


def _side(walk: Walk, key: bool) -> Side:
    found: list[Tensor | None] = []
    for name in Side._fields:
        each = [x for x in (deriver.derivative(name) for deriver in walk.derivers(key)) if x is not None]
        found.append(torch.stack(each).sum(0) if each else None)
    return Side(*found)


def _of_similarity(made: Chunks, dn: Tensor, dd: Tensor, walk: Walk, piece: Piece) -> Tensor:
    """Derivative (Rq, C, C) of s_ij, the weight of the key included."""
    values = walk.spread(made.own_values, piece.chunks)
    return torch.bmm(dn, values.mT).add_(dd.mT).mul_(walk.later(piece.length))


class _Queries:
    """Forwards: derivatives of queries and weights, and those of numerators and denominators for the way back."""

    def __init__(self, d: Tensor, problem: Problem, wanted: frozenset[str]) -> None:
        self.walk = walk = Walk(problem, wanted, None)
        self.settled = Settled()
        q, _v = problem.q, problem.v
        self.dq = torch.empty_like(q)
        self.of_weights = None if walk.weights is None else torch.zeros_like(walk.weights, dtype=walk.wide)
        self.dn: dict[int, Tensor] = {}
        self.dd: dict[int, Tensor] = {}
        self.of_constant: dict[int, tuple[Tensor, Tensor]] = {}
        for piece in walk.pieces:
            made = walk.make(piece)
            finish = walk.settled(made, piece)
            rows = walk.rows(d, piece)
            dn, dd = self.settled.backward(
                rows, made.numerator, walk.safe(made), made.denominator, finish, piece.chunks
            )
            self.dn[piece.start], self.dd[piece.start] = dn, dd
            derivatives = self._features(made, dn, dd, piece)
            of_kv, of_z = self.settled.of_constant_kv, self.settled.of_constant_z
            if (
                of_kv is not None
                and of_z is not None
                and finish.constant_kv is not None
                and finish.constant_z is not None
            ):
                self.of_constant[piece.start] = of_kv, of_z
                part = derivatives[-1]
                at = part[:, -1] if made.queries[-1].tokens_last else part[..., -1]
                kv, z = walk.constants(made, piece, weighted=False)
                at += (of_kv * kv).sum(-1) + (of_z * z)[..., 0]
            deriver = walk.filler(False, piece.chunks)
            assert isinstance(deriver, Deriver)
            self._through_weights(made, derivatives, piece)
            dx = deriver.backward(made.plain, derivatives)
            self.dq[:, :, piece.tokens] = walk.back(dx, q, piece)

    def _features(self, made: Chunks, dn: Tensor, dd: Tensor, piece: Piece) -> list[Tensor]:
        walk = self.walk
        of_similarity = _of_similarity(made, dn, dd, walk, piece)
        if made.weight is not None:
            of_similarity.mul_(walk.spread(made.weight, piece.chunks))
        found: list[Tensor] = []
        for part, keys, kv, z in zip(made.queries, made.spread, made.kv, made.z, strict=True):
            if part.tokens_last:
                x = torch.baddbmm(z.mT * dd, kv, dn.mT)
                found.append(x.baddbmm_(keys.by_feature, of_similarity.mT))
            else:
                x = torch.baddbmm(dd.mT * z, dn, kv.mT)
                found.append(x.baddbmm_(of_similarity, keys.by_feature.mT))
        return found

    def _through_weights(self, made: Chunks, derivatives: list[Tensor], piece: Piece) -> None:
        walk, start = self.walk, 0
        if walk.weights is None or self.of_weights is None:
            return
        for part, d, width in zip(made.plain, derivatives, walk.widths, strict=True):
            rows = walk.weights[:, start : start + width].repeat_interleave(piece.chunks, dim=0)
            of_part = (part.data * d).sum(part.tokens, dtype=walk.wide)
            self.of_weights[:, start : start + width] += of_part.unflatten(0, (-1, piece.chunks)).sum(1)
            d.mul_(rows[:, :, None] if part.tokens_last else rows[:, None])
            start += width


class _Keys:
    """Backwards: derivatives of keys and values, and of the sums before the first token."""

    def __init__(self, queries: _Queries, dkv: Tensor, dz: Tensor, problem: Problem, wanted: frozenset[str]) -> None:
        self.walk = walk = Walk(problem, None, wanted)
        self.queries = queries
        self.dkv = [x.contiguous() for x in dkv.flatten(0, 1).to(walk.wide).split(walk.widths, dim=1)]
        self.dz = [x.contiguous() for x in dz.flatten(0, 1).to(walk.wide).split(walk.widths, dim=1)]
        self.dk, self.dv = torch.empty_like(problem.k), torch.empty_like(problem.v)
        for piece in reversed(walk.pieces):
            self._piece(piece)

    def _piece(self, piece: Piece) -> None:
        walk, queries, chunks = self.walk, self.queries, piece.chunks
        made = walk.make(piece)
        dn, dd = queries.dn.pop(piece.start), queries.dd.pop(piece.start)
        constant = queries.of_constant.pop(piece.start, None)
        of_weighted = _of_similarity(made, dn, dd, walk, piece)
        weight = made.weight
        of_similarity = of_weighted if weight is None else of_weighted * walk.spread(weight, chunks)
        after_kv, after_z = self._after(made, dn, dd, constant, chunks)

        dv = walk.gathered(torch.bmm(made.weighted.mT, dn), chunks)
        of_weight: Tensor | None = None
        deriver = walk.filler(True, chunks)
        assert isinstance(deriver, Deriver)
        if deriver.weight is not None:
            of_weight = walk.gathered((of_weighted * made.similarity).sum(1)[:, None], chunks)
        derivatives: list[Tensor] = []
        for part, queried, kv, z in zip(made.keys, made.queries, after_kv, after_z, strict=True):
            read = torch.bmm(part.by_feature.mT, kv)
            own = torch.baddbmm(z[:, :, None], kv, made.own_values.mT)  # (Rk, F, C), without the weight
            if weight is not None:
                read = read * weight.mT
                if of_weight is not None:
                    of_weight = of_weight + (own * part.by_feature).sum(1)[:, None]
                own = own * weight
            dv += read
            within = walk.gathered(torch.bmm(queried.by_feature, of_similarity), chunks)
            d = own.add_(within)
            derivatives.append(d if part.tokens_last else d.mT.contiguous())
        if constant is not None:
            more, of_more = self._of_constant(made, constant, piece)
            dv += more
            of_weight = None if of_weight is None else of_weight + of_more
        of_log_weight = None
        if of_weight is not None:
            assert weight is not None
            assert deriver.clamped is not None
            of_log_weight = (of_weight * weight).masked_fill_(deriver.clamped, 0.0)
        dx = deriver.backward(made.keys, derivatives, of_log_weight)
        if made.dropped is not None:
            dx, dv = dx.masked_fill(made.dropped.mT, 0.0), dv.masked_fill(made.dropped.mT, 0.0)
        self.dk[:, :, piece.tokens] = walk.back(dx, self.dk, piece)
        self.dv[:, :, piece.tokens] = walk.back(dv, self.dv, piece)

    def _after(
        self, made: Chunks, dn: Tensor, dd: Tensor, constant: tuple[Tensor, Tensor] | None, chunks: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives of the sums after each chunk of a piece, a row per key head; those before it are kept."""
        walk = self.walk
        after_kv: list[Tensor] = []
        after_z: list[Tensor] = []
        for i, part in enumerate(made.queries):
            of_kv = torch.bmm(part.by_feature, dn)
            of_z = torch.bmm(part.by_feature, dd.mT)[..., 0]
            if constant is not None and i == len(made.queries) - 1:
                factor = part.by_feature[:, -1]  # (Rq, C)
                of_kv[:, -1] += (factor[..., None] * constant[0]).sum(1)
                of_z[:, -1] += (factor[..., None] * constant[1]).sum((1, 2))
            self.dkv[i], kv = _running_back(self.dkv[i], walk.gathered(of_kv, chunks).to(walk.wide), chunks)
            self.dz[i], z = _running_back(self.dz[i], walk.gathered(of_z, chunks).to(walk.wide), chunks)
            after_kv.append(kv.to(walk.dtype))
            after_z.append(z.to(walk.dtype))
        return after_kv, after_z

    def _of_constant(self, made: Chunks, constant: tuple[Tensor, Tensor], piece: Piece) -> tuple[Tensor, Tensor]:
        """Derivatives of values (Rk, C, Dv) and weights (Rk, 1, C) through what the constant feature gives within."""
        walk, chunks = self.walk, piece.chunks
        factor = made.queries[-1].by_feature[:, -1, :, None]  # (Rq, C, 1)
        back = walk.later(piece.length).mT
        of_kv = walk.gathered(back @ (factor * constant[0]), chunks)
        of_z = walk.gathered(back @ (factor * constant[1]), chunks)
        of_weight = ((of_kv * made.own_values).sum(-1, keepdim=True) + of_z).mT
        return (of_kv if made.weight is None else of_kv * made.weight.mT), of_weight


def _running_back(end: Tensor, steps: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """end (R, ...) and steps (R chunks, ...) -> their sum, and the sum after each step (R chunks, ...)."""
    steps = steps.unflatten(0, (-1, chunks)).flip(1)
    total = torch.cat([end[:, None], steps], dim=1).cumsum(1)
    return total[:, -1].contiguous(), total[:, :-1].flip(1).flatten(0, 1)
