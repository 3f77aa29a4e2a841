"""One call of a mechanism judged: a few rows exactly, more where they leave it open, and what all rows say at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maclin.adopt.guard.bounds import outliers
from maclin.adopt.guard.estimate import Estimate, Sums, decision, estimates, row_sums
from maclin.adopt.guard.exact import exact_rows
from maclin.adopt.guard.rows import query_mask, sample_rows

MORE = 3
"""So many times the rows are added where the first ones leave the decision open."""

STATISTICS: tuple[str, ...] = ("q_norm", "k_norm", "entropy_ratio")
"""What the input of a layer is watched by: mean lengths of q and k, and entropy over log of the keys attended."""

_KEYS = 256
"""Keys whose lengths are looked at, at most."""


@dataclass(frozen=True)
class Call:
    """What a mechanism was given, and what it made of it.

    Shape:
        q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, Dv), out (B, H, N, Dv), key_mask (B, S) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    key_mask: Tensor | None
    is_causal: bool
    scale: float | None

    @property
    def valid(self) -> Tensor | None:
        """Which queries are tokens, (B, N)."""
        return query_mask(self.q.shape[2], self.k.shape[2], self.key_mask, self.is_causal)

    def only(self, sequences: list[int]) -> Call:
        """These sequences."""
        if sequences == list(range(self.q.shape[0])):
            return self
        chosen = torch.tensor(sequences, device=self.q.device)
        q, k, v, out = (x.index_select(0, chosen) for x in (self.q, self.k, self.v, self.out))
        mask = None if self.key_mask is None else self.key_mask.index_select(0, chosen)
        return replace(self, q=q, k=k, v=v, out=out, key_mask=mask)


@dataclass(frozen=True)
class Seen:
    """What the guard found in one sequence of a call.

    Attributes:
        reason: why it is flagged: "error", "bound", "nonfinite"; None where it is not.
        estimate: of its error; None where no row was computed, or it has no token.
        statistics: q_norm, k_norm and entropy_ratio of the sampled rows; empty without them.
        beyond: rows longer than any average of values.
    """

    reason: str | None
    estimate: Estimate | None
    statistics: dict[str, float]
    beyond: int


def examine(call: Call, tolerance: float, rows: int, confidence: float, generator: torch.Generator) -> list[Seen]:
    """Judge every sequence of a call.

    Args:
        call: what came in and out.
        tolerance: relative error from which on a sequence is flagged.
        rows: computed exactly per sequence and head, at first.
        confidence: of the bounds that the decision rests on.
        generator: of the rows, on the CPU.
    """
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        sums, rows_of, statistics = _sampled(call, rows, generator)
        found = estimates(sums, rows_of, call.q.shape[1], confidence)
        undecided = [i for i, one in enumerate(found) if rows_of[i] == rows and decision(one, tolerance) == "open"]
        if undecided:
            more, more_of, _ = _sampled(call.only(undecided), MORE * rows, generator)
            first = Sums(*(x[undecided] for x in sums))
            joined = _joined(first, more, rows, more_of)
            totals = [rows + count for count in more_of]
            for i, one in zip(undecided, estimates(joined, totals, call.q.shape[1], confidence), strict=True):
                found[i] = one
        all_rows = [float(call.q.shape[1] * tokens) for tokens in _tokens(call)]
        sizes = [size * rows for size, rows in zip(sums.size.tolist(), all_rows, strict=True)]
        seen = glance(call, tolerance, sizes)
    return [
        replace(of_all, reason=_reason(of_all, one, tolerance), estimate=one, statistics=figures) if count else of_all
        for of_all, one, count, figures in zip(seen, found, rows_of, statistics, strict=True)
    ]


def glance(call: Call, tolerance: float, sizes: list[float] | None = None) -> list[Seen]:
    """What all rows say without exact attention: NaN, infinity, and lengths that no average of values has.

    Args:
        call: what came in and out.
        tolerance: relative error from which on a sequence is flagged.
        sizes: ||exact||_F² of each sequence, where it was estimated.
    """
    with torch.no_grad():
        found = outliers(call.out, call.v, call.key_mask, call.is_causal, call.valid)
    sizes = [math.inf] * len(found) if sizes is None else sizes
    reasons = [
        "nonfinite" if one.nonfinite else "bound" if one.least_rel_error(size) > tolerance else None
        for one, size in zip(found, sizes, strict=True)
    ]
    return [Seen(reason, None, {}, one.beyond) for reason, one in zip(reasons, found, strict=True)]


def true_errors(call: Call, exact: Tensor) -> list[float]:
    """Relative error of each sequence over all rows, beside the exact output: what ``examine`` estimates."""
    dtype = torch.promote_types(exact.dtype, torch.float32)
    error = (call.out.to(dtype) - exact.to(dtype)).square().sum(-1)
    size = exact.to(dtype).square().sum(-1)
    if call.valid is not None:
        error, size = (x.masked_fill(~call.valid[:, None], 0.0) for x in (error, size))
    pairs = torch.stack([x.sum((1, 2), dtype=torch.float64) for x in (error, size)], -1).tolist()
    return [math.sqrt(a / b) if b > 0 else math.inf if a > 0 else 0.0 for a, b in pairs]


def _sampled(call: Call, rows: int, generator: torch.Generator) -> tuple[Sums, list[int], list[dict[str, float]]]:
    """Sums over the sampled rows, how many each sequence gave per head, and what the input looks like there."""
    batch, heads, num_queries, width = call.q.shape
    chosen = sample_rows(batch, heads, num_queries, rows, call.valid, generator, call.q.device)
    exact = exact_rows(call.q, call.k, call.v, chosen.positions, call.key_mask, call.is_causal, call.scale)
    at = chosen.positions[..., None]
    out = call.out.gather(2, at.expand(-1, -1, -1, call.out.shape[-1])).to(exact.out.dtype)
    size = exact.out.square().sum(-1)
    sums = row_sums((out - exact.out).square().sum(-1), size, chosen.taken, chosen.tokens)
    taken = chosen.taken[:, None].to(size.dtype)
    number = (taken.sum((1, 2)) * heads).clamp_min(1.0)
    q_norm = torch.linalg.vector_norm(call.q.gather(2, at.expand(-1, -1, -1, width)), dim=-1, dtype=size.dtype)
    figures = torch.stack(
        [
            (q_norm * taken).sum((1, 2)) / number,
            _k_norm(call),
            (exact.entropy_ratio * taken).sum((1, 2)) / number,
            chosen.taken.sum(-1).to(size.dtype),
        ],
        -1,
    ).tolist()
    statistics = [dict(zip(STATISTICS, row[:3], strict=True)) for row in figures]
    return sums, [int(row[3]) for row in figures], statistics


def _tokens(call: Call) -> list[int]:
    """Queries of each sequence that are no padding."""
    valid = call.valid
    return [call.q.shape[2]] * call.q.shape[0] if valid is None else valid.sum(-1).tolist()


def _k_norm(call: Call) -> Tensor:
    """Mean length of some keys of each sequence, evenly spread, padding left out: (B,)."""
    step = max(1, call.k.shape[2] // _KEYS)
    dtype = torch.promote_types(call.k.dtype, torch.float32)
    length = torch.linalg.vector_norm(call.k[:, :, ::step], dim=-1, dtype=dtype).mean(1)
    if call.key_mask is None:
        return length.mean(-1)
    weight = call.key_mask[:, ::step].to(length.dtype)
    return (length.masked_fill(weight == 0, 0.0)).sum(-1) / weight.sum(-1).clamp_min(1.0)


def _joined(first: Sums, more: Sums, rows: int, more_of: list[int]) -> Sums:
    """The means over both draws. Their residuals refer to slightly different ratios, which is of second order."""
    both = torch.tensor(more_of, dtype=torch.float64, device=first.error.device)
    share = rows / (rows + both)
    return Sums(
        share * first.error + (1 - share) * more.error,
        share * first.size + (1 - share) * more.size,
        share.square() * first.variance + (1 - share).square() * more.variance,
        share.pow(3) * first.third + (1 - share).pow(3) * more.third,
    )


def _reason(of_all: Seen, estimate: Estimate, tolerance: float) -> str | None:
    """NaN first, then what the sample says, then what all rows say."""
    if of_all.reason == "nonfinite" or not estimate.finite:
        return "nonfinite"
    return of_all.reason if decision(estimate, tolerance) == "within" else "error"
