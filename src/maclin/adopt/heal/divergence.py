"""Divergence of logits from a few of the original's, and its derivative, a few rows at a time.

Logits of a language model are the largest tensors of a step. Row by row they pass the cache once, where a chain of
operations would make several more of their size, and fetch the memory for each of them from the system.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_NUMBERS = 1 << 19  # of logits at a time: in float32 they lie in a processor's second cache
_LEAST = 1e-30  # a probability below which its logarithm is not taken from it
_LEAST_REST = 1e-6


def largest(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ``top`` largest logits of each row of (T, V): where they are (T, top), and their log-probabilities."""
    index = logits.new_empty(len(logits), top, dtype=torch.int64)
    found = logits.new_empty(len(logits), top, dtype=torch.float32)
    for rows in _blocks(logits):
        block = logits[rows].float()
        values, index[rows] = block.topk(top, dim=-1)
        found[rows] = values - block.logsumexp(-1, keepdim=True)
    return index, found


def top_divergence(logits: Tensor, top: Tensor, index: Tensor) -> Tensor:
    """Mean KL divergence in nats of the original from ours, all but the original's largest classes taken as one.

    Shape: logits (T, V), top (T, K) log-probabilities and index (T, K). Equal to the divergence of all classes where
        K = V; below it otherwise. Differentiable once, by logits.
    """
    found = _Divergence.apply(logits, top, index)
    assert isinstance(found, Tensor)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top: Tensor, index: Tensor) -> Tensor:
        derived = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        merges = index.shape[-1] < logits.shape[-1]
        total = logits.new_zeros((), dtype=torch.float32)
        for rows in _blocks(logits):
            block, their_log, at = logits[rows], top[rows], index[rows]
            probability = block.softmax(-1, dtype=torch.float32)
            ours = probability.gather(-1, at)
            theirs, our_log = their_log.exp(), _logarithms(block, ours, at)
            total += (theirs * (their_log - our_log)).sum()
            change = -theirs  # derivatives by our log-probabilities
            if merges:
                rest, our_rest = (1.0 - x.sum(-1, keepdim=True) for x in (theirs, ours))
                rest, safe = rest.clamp_min(_LEAST_REST), our_rest.clamp_min(_LEAST_REST)
                total += (rest * (rest.log() - safe.log())).sum()
                change += ours * torch.where(our_rest < _LEAST_REST, 0.0, rest / safe)
            if derived is not None:
                change /= len(logits)
                probability *= -change.sum(-1, keepdim=True)
                derived[rows] = probability.scatter_add_(-1, at, change)
        ctx.derived = derived
        return total / max(len(logits), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        factor = gradients[0]
        return ctx.derived if float(factor) == 1.0 else ctx.derived * factor.to(ctx.derived.dtype), None, None


def _logarithms(logits: Tensor, probability: Tensor, index: Tensor) -> Tensor:
    """Of probabilities (T, K) of some of the logits (T, V), precise where they are tiny."""
    logs, most = logits.gather(-1, index).float(), probability.argmax(-1, keepdim=True)
    known = probability.gather(-1, most)
    if bool((known < _LEAST).any()):
        return logs - logits.float().logsumexp(-1, keepdim=True)
    return logs - logs.gather(-1, most) + known.log()


def _blocks(logits: Tensor) -> Iterator[slice]:
    count = len(logits) if logits.device.type != "cpu" else max(_NUMBERS // max(logits.shape[-1], 1), 1)
    for start in range(0, len(logits), max(count, 1)):
        yield slice(start, min(start + count, len(logits)))
