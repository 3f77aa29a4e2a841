"""Which Maclaurin features a layer gets: chosen by what each adds to the attention output, on the user's q, k, v.

A dot product t = <x, y> is the same in any pair of bases A, B with A B^T = 1: t = <u, w> with u = A^T x and
w = B^T y. In the balanced pair, in which the second moments of u and of w are one and the same diagonal s, the
monomials u^alpha, w^alpha of the few largest s carry most of f(t), because

    t^n = sum over |alpha| = n of (n! / alpha!) u^alpha w^alpha,

and each monomial costs one feature, without variance. What is left out is the truncation, which is measured.

For exp both sides are centred as well: exp(<x, y>) = exp(<x, c_k>) exp(<c_q, y - c_k>) exp(<x - c_q, y - c_k>).
The first factor is one number per query, which cancels in the output; the second one number per key, which is
exact; only the third, of a much smaller radius, is expanded. c_q is the mean of x, c_k the mean of y under the
weights exp(<c_q, y>).

To first order a left-out monomial changes row i of the output by p_i (kv - z o_i) / Z_i with p_i = u_i^alpha sqrt(c),
kv = sum_j w_j^alpha sqrt(c) h_j v_j, z the same without v, and Z_i, o_i exact. The sum over rows of its square is
what the monomial is worth; per degree the layer keeps as many as pay best over all its heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import InputError
from .kernels import Kernel

T = TypeVar("T")

MAX_DEGREE = 6
"""Of the monomials that are considered."""

_DOCUMENTS, _ROWS, _KEYS = 24, 96, 2048  # at most so many are looked at, which bounds the time and the memory
_LEAST_TOKENS = 4  # per axis of the head, before second moments say anything
_MOST_GAINED = 0.1  # of |o_i|^2 by one monomial: in a row where the series does not converge, none is worth much
_SIGNIFICANT = 4.0  # squared standard errors by which a centre must differ from 0
_RIDGE = 1e-6  # of the mean second moment: an axis without any is kept, but never divided by


@dataclass(frozen=True)
class Document:
    """Some queries of one sequence for one key head, and all keys they attend to; scaled, float64, on the CPU.

    x (n, D), y (S, D), v (S, Dv); allowed (n, S) bool where causal, otherwise None.
    """

    x: Tensor
    y: Tensor
    v: Tensor
    allowed: Tensor | None = None


@dataclass(frozen=True)
class Basis:
    """Centres and the balanced pair of bases of one key head.

    q, k (D, D): u = q^T (x - q_centre), w = k^T (y - k_centre), <u, w> = <x - q_centre, y - k_centre>;
    spread (D,), descending: the second moments of u, and of w.
    """

    q: Tensor
    k: Tensor
    q_centre: Tensor
    k_centre: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Monomials:
    """Candidates of one head, ordered by degree, within a degree by worth.

    Args:
        axes: per degree n = 0, 1, ... the axes whose product each monomial is, (count, n).
        worth: per degree, squared error of the output that is saved by keeping it, over ||out||^2; (count,).
    """

    axes: tuple[Tensor, ...]
    worth: tuple[Tensor, ...]

    @classmethod
    def ordered(cls, axes: Sequence[Tensor], worth: Sequence[Tensor], total: float) -> Monomials:
        """By worth, given in any order as a squared error; ``total`` is ||out||^2."""
        order = [w.argsort(descending=True) for w in worth]
        return cls(
            tuple(chosen[o] for chosen, o in zip(axes, order, strict=True)),
            tuple(w[o] / max(total, 1e-300) for w, o in zip(worth, order, strict=True)),
        )


def documents(x: Tensor, y: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool, head: int) -> list[Document]:
    """The sequences of one key head, thinned out evenly to a bounded number of sequences, keys and queries.

    Shape: x (B, H, N, D), y (B, Hk, S, D), v (B, Hk, S, Dv), key_mask (B, S).
    """
    group = x.shape[1] // y.shape[1]
    found: list[Document] = []
    for b in spread_evenly(x.shape[0], _DOCUMENTS):
        keys, rows = torch.arange(y.shape[2]), torch.arange(x.shape[2])
        if key_mask is not None:
            keys = keys[key_mask[b].cpu()]
            if x.shape[2] == y.shape[2]:
                rows = rows[key_mask[b].cpu()]
        if not len(keys) or not len(rows):
            continue
        keys, rows = keys[spread_evenly(len(keys), _KEYS)], rows[spread_evenly(len(rows), max(_ROWS // group, 8))]
        queries = x[b, head * group : (head + 1) * group][:, rows.to(x.device)].flatten(0, 1).cpu().double()
        allowed = None
        if is_causal:
            allowed = (keys[None] <= rows[:, None] + (y.shape[2] - x.shape[2])).repeat(group, 1)
            seen = allowed.any(-1)
            queries, allowed = queries[seen], allowed[seen]
        its_keys, values = (t[b, head, keys.to(t.device)].cpu().double() for t in (y, v))
        found.append(Document(queries, its_keys, values, allowed))
    return found


def check_enough(name: str, docs: Sequence[Document], head_dim: int) -> None:
    """Refuse calibration data that cannot say anything about D axes.

    Raises:
        InputError: too few tokens, or numbers that are not finite.
    """
    tokens = sum(len(doc.y) for doc in docs)
    if tokens < _LEAST_TOKENS * head_dim:
        raise InputError(
            f"{name}: {tokens} tokens to calibrate on; wanted at least {_LEAST_TOKENS * head_dim}, {_LEAST_TOKENS} per "
            f"axis of a head of width {head_dim}: pass more or longer sequences"
        )
    if not all(bool(torch.isfinite(t).all()) for doc in docs for t in (doc.x, doc.y, doc.v)):
        raise InputError(f"{name}: the calibration data hold NaN or infinity; wanted finite q, k and v")


def basis_of(docs: Sequence[Document], centred: bool) -> Basis:
    """Centres (zero unless ``centred``) and the balanced bases of one head's documents."""
    x = torch.cat([doc.x for doc in docs])
    width = x.shape[-1]
    q_centre = _centre(x.mean(0), x) if centred else x.new_zeros(width)
    weights = [torch.softmax(doc.y @ q_centre, 0) for doc in docs]  # all 1 / S where not centred
    k_centre = x.new_zeros(width)
    if centred:
        mean = torch.stack([h @ doc.y for h, doc in zip(weights, docs, strict=True)]).mean(0)
        k_centre = _centre(mean, torch.cat([doc.y for doc in docs]))
    of_q = _moment(x - q_centre, x.new_full((len(x),), 1.0 / len(x)))
    of_k = torch.stack([_moment(doc.y - k_centre, h) for h, doc in zip(weights, docs, strict=True)]).mean(0)
    lower = torch.linalg.cholesky(_ridged(of_q))
    squares, vectors = torch.linalg.eigh(lower.mT @ _ridged(of_k) @ lower)
    spread, vectors = squares.flip(0).clamp_min(1e-30).sqrt(), vectors.flip(1)
    a = torch.linalg.solve_triangular(lower.mT, vectors, upper=True) * spread.sqrt()
    b = lower @ vectors / spread.sqrt()
    return Basis(a, b, q_centre, k_centre, spread)


def candidates(spread: Tensor, most: Sequence[int]) -> tuple[Tensor, ...]:
    """Axes of the monomials worth looking at, per degree 0, 1, 2, ..., at most most[n - 2] of degree n >= 2.

    Those of the largest product of spreads; each is a monomial of one degree less times one more axis.
    """
    width = len(spread)
    logs = spread.log()
    axes: list[Tensor] = [torch.empty(1, 0, dtype=torch.int64), torch.arange(width)[:, None]]
    weights = logs.clone()
    for place in range(len(most)):
        grown = weights[:, None] + logs[None]
        grown = grown.masked_fill(torch.arange(width)[None] < axes[-1][:, -1:], -torch.inf)  # each product once
        kept = max(most[place:])  # a degree above may want more
        weights, best = grown.flatten().topk(min(kept, int((grown > -torch.inf).sum())))
        axes.append(torch.cat([axes[-1][best // width], (best % width)[:, None]], dim=-1))
    return tuple(axes)


def multiplicity(axes: Tensor) -> Tensor:
    """n! / alpha! of each row of axes (count, n), ascending."""
    repeats = torch.ones(len(axes), dtype=torch.float64)
    factorials = torch.ones(len(axes), dtype=torch.float64)  # alpha!, as the product over places of repeats so far
    for place in range(1, axes.shape[-1]):
        repeats = torch.where(axes[:, place] == axes[:, place - 1], repeats + 1, 1.0)
        factorials = factorials * repeats
    return float(math.factorial(axes.shape[-1])) / factorials


def monomials(u: Tensor, axes: Sequence[Tensor], kernel: Kernel) -> list[Tensor]:
    """sqrt(a_n n! / alpha!) u^alpha per degree: u (n, D) -> (n, count) each."""
    values: list[Tensor] = []
    along = u.mT.contiguous()  # an axis is a row then, and taking it a copy
    for degree, chosen in enumerate(axes):
        scale = (kernel.coefficient(degree) * multiplicity(chosen)).sqrt().to(u)
        product = scale[:, None].repeat(1, len(u))
        for r in range(degree):
            product *= along.index_select(0, chosen[:, r])
        values.append(product.mT)
    return values


def appraise(docs: Sequence[Document], basis: Basis, kernel: Kernel, axes: Sequence[Tensor]) -> Monomials:
    """What each candidate is worth on the documents; the candidates of each degree are ordered by it."""
    worth, totals = worths(docs, basis, kernel, axes)
    return Monomials.ordered(axes, [w.sum(0) for w in worth], float(totals.sum()))


def worths(
    docs: Sequence[Document], basis: Basis, kernel: Kernel, axes: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Per degree the squared error that each candidate saves each document (documents, count), and its ||out||^2."""
    worth = [torch.zeros(len(docs), len(chosen), dtype=torch.float64) for chosen in axes]
    totals = torch.zeros(len(docs), dtype=torch.float64)
    for i, doc in enumerate(docs):
        exact = Exact(doc, basis, kernel)
        both = monomials(torch.cat([exact.u, exact.w]).float(), axes, kernel)  # an order needs no more digits
        of_out = exact.out.square().sum(-1, keepdim=True)
        totals[i] = of_out.sum()
        for degree, values in enumerate(both):
            p, psi = values[: len(exact.u)], values[len(exact.u) :]
            for rows, kv, z in _sums_seen(psi * exact.h[:, None].float(), doc):
                out, square_of_out = exact.out[rows].float(), of_out[rows]
                # ||kv - z o_i||^2 without making it for every pair
                square = (kv * kv).sum(-1) - 2 * (out @ kv.mT) * z + square_of_out * z * z
                gained = (p[rows].double() / exact.total[rows, None]).square() * square.clamp_min(0)
                worth[degree][i] += torch.minimum(gained, _MOST_GAINED * square_of_out).sum(0)
    return worth, totals


def allocate(
    heads: Sequence[Monomials], errors: Sequence[float], num_features: int, highest: int = MAX_DEGREE
) -> tuple[int, ...]:
    """How many monomials of each degree the layer keeps: 1 and D of degrees 0 and 1, then what pays best.

    The k-th best of a degree is worth what it is worth to all heads together, each over the square of the error that
    degrees 0 and 1 leave it (``errors``), so that a head no polynomial can follow does not take what others need. As
    that falls with k, taking the best remaining one each time is the best choice there is.
    """
    least = [min(len(head.worth[degree]) for head in heads) for degree in range(min(len(heads[0].worth), highest + 1))]
    lacking = torch.tensor([max(error, 1e-6) ** -2 for error in errors], dtype=torch.float64)[:, None]
    pooled = [
        (torch.stack([head.worth[degree][:count] for head in heads]) * lacking).sum(0)
        for degree, count in enumerate(least)
    ]
    width = least[1]
    left = num_features - 1 - width
    values = torch.cat(pooled[2:])
    degrees = torch.cat([torch.full((count,), degree) for degree, count in enumerate(least) if degree > 1])
    useful = int((values > 0).sum())
    taken = degrees[values.argsort(descending=True)[: min(left, useful)]]
    counts = [1, width, *(int((taken == degree).sum()) for degree in range(2, len(least)))]
    while len(counts) > 2 and counts[-1] == 0:
        counts.pop()
    return tuple(counts)


def truncation(
    docs: Sequence[Document], basis: Basis, kernel: Kernel, axes: Sequence[Tensor], floor: float
) -> tuple[Tensor, float]:
    """Squared error of the output for every highest degree 0, 1, ..., and the square of the output itself.

    The first entry is plain averaging (no weights of keys either), the second degree 0 with the weights of keys,
    then degrees up to 1, up to 2, and so on; all as ratios, not to first order.
    """
    squares = torch.zeros(len(axes) + 1, dtype=torch.float64)
    total = 0.0
    for doc in docs:
        exact = Exact(doc, basis, kernel)
        total += float(exact.out.square().sum())
        uniform = exact.allowed / exact.allowed.sum(-1, keepdim=True)
        squares[0] += (uniform @ doc.v - exact.out).square().sum()
        similarity = torch.zeros_like(exact.allowed)
        for degree, values in enumerate(monomials(torch.cat([exact.u, exact.w]), axes, kernel)):
            similarity = similarity + values[: len(exact.u)] @ values[len(exact.u) :].mT
            weights = similarity * exact.h * exact.allowed
            constant = kernel.coefficient(0) * exact.h * exact.allowed
            out = shrunk(weights, constant, floor) @ doc.v
            squares[degree + 1] += (out - exact.out).square().sum()
    return squares, total


def shrunk(weights: Tensor, constant: Tensor, floor: float) -> Tensor:
    """Attention weights (n, S) that sum to 1, what lies beyond ``constant`` shrunk where the floor asks for it."""
    total, least = weights.sum(-1, keepdim=True), constant.sum(-1, keepdim=True)
    if floor:
        share = torch.where(total < floor * least, (1 - floor) * least / (least - total), 1.0)
        weights = constant + share * (weights - constant)
        total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


class Exact:
    """Exact kernel attention of a document, and its centred, balanced coordinates.

    Attributes:
        u, w: coordinates (n, D) and (S, D).
        h: weights of the keys (S,), 1 where nothing is centred; a factor common to all is left out.
        allowed: (n, S), 1 where a query may attend, else 0.
        total: Z (n,), the sum of f(<u, w>) h.
        out: exact output (n, Dv).
    """

    def __init__(self, doc: Document, basis: Basis, kernel: Kernel) -> None:
        x, y = doc.x - basis.q_centre, doc.y - basis.k_centre
        self.u, self.w = x @ basis.q, y @ basis.k
        log_h = y @ basis.q_centre
        self.h = (log_h - log_h.max()).exp()
        t = x @ y.mT
        self.allowed = torch.ones_like(t) if doc.allowed is None else doc.allowed.to(t.dtype)
        if kernel.is_exponential:
            # its logarithm is known: so the weights stay finite where Z itself, at a large radius, does not
            logits = (t + log_h - log_h.max()).masked_fill(self.allowed == 0, -torch.inf)
            self.total = logits.logsumexp(-1).exp()
            self.out = torch.softmax(logits, -1) @ doc.v
            return
        weights = kernel(t) * self.h * self.allowed
        self.total = weights.sum(-1)
        self.out = weights @ doc.v / self.total[:, None]


def _centre(mean: Tensor, x: Tensor) -> Tensor:
    """The mean, or 0 where it is within its own standard error."""
    noise = (x - mean).square().sum(-1).mean() / len(x)
    return mean if float(mean.square().sum()) > _SIGNIFICANT * float(noise) else torch.zeros_like(mean)


def _sums_seen(weighted: Tensor, doc: Document) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Rows that attend to the same keys, with sums over these: weighted (S, count) -> kv (count, Dv), z (count,).

    Where causal, a row attends to the keys up to some position.
    """
    v = doc.v.to(weighted.dtype)
    if doc.allowed is None:
        yield slice(None), weighted.mT @ v, weighted.sum(0)
        return
    seen = doc.allowed.sum(-1)
    kv, z, start = weighted.new_zeros(weighted.shape[1], v.shape[1]), weighted.new_zeros(weighted.shape[1]), 0
    for stop in seen.unique().tolist():
        keys = slice(start, stop)
        kv, z, start = kv + weighted[keys].mT @ v[keys], z + weighted[keys].sum(0), stop
        yield (seen == stop).nonzero()[:, 0], kv, z


def _moment(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights[:, None]).mT @ x


def _ridged(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean().clamp_min(1e-30)
    return moment + _RIDGE * mean * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def spread_evenly(length: int, most: int) -> Tensor:
    """At most so many indices, evenly spread, each in the middle of its part.

    Not the ends: the first query of a causal sequence has the longest output and no error, and would count too often.
    """
    if length <= most:
        return torch.arange(length)
    return ((torch.arange(most) + 0.5) * (length / most)).long()


def split(sequences: Sequence[T]) -> tuple[list[T], list[T]]:
    """Those to learn from and those to check on: every third is held back; below three all serve both."""
    if len(sequences) < 3:
        return list(sequences), list(sequences)
    return [s for i, s in enumerate(sequences) if i % 3 != 2], list(sequences[2::3])
