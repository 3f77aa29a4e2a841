"""Which query rows are computed exactly: stratified over sequences, heads and positions, never padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Sampled query rows.

    Shape:
        positions (B, H, R): of the queries, ascending along R but for what is not taken.
        taken (B, R) bool: False where a sequence has fewer tokens than R.
        tokens (B,): queries of each sequence that are no padding.
    """

    positions: Tensor
    taken: Tensor
    tokens: Tensor


def query_mask(num_queries: int, num_keys: int, key_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Which queries are tokens, (B, N) bool; None where all are, or where nothing says otherwise.

    Queries are the last keys if attention is causal, or if there are as many of them.
    """
    if key_mask is None or (num_queries != num_keys and not is_causal):
        return None
    return key_mask[:, num_keys - num_queries :]


def sample_rows(
    batch: int,
    heads: int,
    num_queries: int,
    rows: int,
    valid: Tensor | None,
    generator: torch.Generator,
    device: torch.device,
) -> Rows:
    """One row drawn from each of R strata of equally many tokens, for each sequence and head on its own.

    A sequence with at most ``rows`` tokens gives all of them: then nothing is estimated.

    Args:
        batch: B.
        heads: H.
        num_queries: N.
        rows: per sequence and head.
        valid: (B, N) bool, which queries are tokens; None where all are.
        generator: of the draw, on the CPU.
        device: of the result.
    """
    most = min(rows, num_queries)
    if valid is None:
        if most == num_queries:
            positions = torch.arange(num_queries, device=device).expand(batch, heads, -1)
        else:
            drawn = torch.rand(batch, heads, most, generator=generator)
            positions = _in_strata(drawn, torch.tensor(float(num_queries)), torch.tensor(float(most))).to(device)
        taken = torch.ones(batch, most, dtype=torch.bool, device=device)
        return Rows(positions, taken, torch.full((batch,), num_queries, device=device))
    tokens = valid.sum(-1)
    strata = tokens.clamp_max(most)
    taken = torch.arange(most, device=device) < strata[:, None]
    drawn = torch.rand(batch, heads, most, generator=generator).to(device)
    # of fewer tokens than strata each is its own stratum, so that rounding down gives them in order
    ranks = _in_strata(drawn, tokens[:, None, None].float(), strata[:, None, None].float())
    ranks = torch.where(taken[:, None], ranks, torch.zeros_like(ranks))
    passed = valid.cumsum(-1).contiguous()
    found = torch.searchsorted(passed, (ranks + 1).flatten(1)).unflatten(1, (heads, most))
    return Rows(found.clamp_max(num_queries - 1), taken, tokens)


def _in_strata(drawn: Tensor, tokens: Tensor, strata: Tensor) -> Tensor:
    """Ranks (B, H, R) below ``tokens``: one in each of ``strata`` equal parts, at the share ``drawn`` of it."""
    stratum = torch.arange(drawn.shape[-1], device=drawn.device)
    width = (tokens / strata.clamp_min(1.0)).double()
    single = width == 1
    drawn = torch.where(single, torch.full_like(drawn, 0.5), drawn)
    ranks = ((stratum + drawn.double()) * width).long()
    return torch.minimum(ranks, (tokens.long() - 1).clamp_min(0))
