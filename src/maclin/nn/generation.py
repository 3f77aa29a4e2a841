"""Choosing tokens one after the other: greedy or sampled, until every sequence has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.errors import OptionError

PADDING = 0
"""The id that stands behind the end of a sequence; it is never chosen."""


def check_sampling(
    vocab_size: int, max_new_tokens: int, temperature: float, top_k: int | None, **marks: int | None
) -> None:
    """Refuse options of a generation that cannot be; raises OptionError."""
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; wanted a positive integer")
    if not 0 <= temperature < float("inf"):
        raise OptionError(f"temperature is {temperature}; wanted 0 (greedy) or a positive number")
    if top_k is not None and not 1 <= top_k < vocab_size:
        raise OptionError(f"top_k is {top_k}; wanted 1 to {vocab_size - 1}, or None for all tokens")
    for name, mark in marks.items():
        if mark is not None and not 0 < mark < vocab_size:
            raise OptionError(f"{name} is {mark}; wanted 1 to {vocab_size - 1} (0 is padding)")


def choose(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None = None) -> Tensor:
    """One id per row.

    Args:
        scores: (B, vocabulary).
        temperature: 0 takes the best; otherwise p = softmax(scores / temperature).
        top_k: only so many of the best are chosen from.
        generator: of the sample; None is torch's own.

    Returns:
        (B,) ids.
    """
    scores = scores.float()
    scores[:, PADDING] = -torch.inf
    if temperature == 0:
        return scores.argmax(-1)
    if top_k is not None:
        best, ids = scores.topk(top_k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter_(1, ids, best)
    chances = torch.softmax(scores / temperature, dim=-1)
    device = chances.device if generator is None else generator.device
    return torch.multinomial(chances.to(device), 1, generator=generator)[:, 0].to(scores.device)


def continued(
    scores: Tensor,
    step: Callable[[Tensor], Tensor],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    eos_id: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Token after token, until all sequences have ended.

    Args:
        scores: (B, vocabulary), of the first new token.
        step: ids (B, 1) of the tokens just chosen -> scores (B, vocabulary) of the next.
        max_new_tokens: at most so many.
        temperature: see ``choose``.
        top_k: see ``choose``.
        eos_id: ends a sequence; what follows it is padding, 0.
        generator: see ``choose``.

    Returns:
        (B, at most max_new_tokens) ids, the end mark included.
    """
    made: list[Tensor] = []
    ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for i in range(max_new_tokens):
        chosen = choose(scores, temperature, top_k, generator).masked_fill(ended, PADDING)
        made.append(chosen)
        if eos_id is not None:
            ended = ended | (chosen == eos_id)
            if bool(ended.all()):
                break
        if i + 1 < max_new_tokens:
            scores = step(chosen[:, None])
    return torch.stack(made, dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
