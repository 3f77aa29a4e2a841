"""Counting what the denominator policy guarded, only where somebody asks.

Counting needs the numbers on the host, which would make every forward wait for the device. So
``forward`` counts only inside ``with guarded() as counts:``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class GuardCounts:
    """Output rows seen inside one ``guarded()`` block, and how many had a bad denominator.

    Attributes:
        rows: output rows (batch x heads x queries) that attend to at least one key.
        negative: rows whose denominator was negative, so that some weights have the wrong sign.
        guarded: rows whose denominator was too small to divide by, or below the floor of its features, and was
            replaced.
        clamped: keys (batch x key heads x keys) whose weight was cut, because its logarithm was beyond what float32
            can sum.
    """

    rows: int = 0
    negative: int = 0
    guarded: int = 0
    clamped: int = 0


_active: list[GuardCounts] = []


@contextmanager
def guarded() -> Generator[GuardCounts]:
    """Count rows with guarded or negative denominators of every contraction inside the block.

    Example:
        >>> with maclin.guarded() as counts:
        ...     out = mech(q, k, v)
        >>> counts.guarded / counts.rows
    """
    counts = GuardCounts()
    _active.append(counts)
    try:
        yield counts
    finally:
        # by identity: nested blocks that have counted the same are equal, but not one
        _active[:] = [other for other in _active if other is not counts]


def asked() -> bool:
    """Whether anybody is counting."""
    return bool(_active)


def count(empty: Tensor, negative: Tensor, small: Tensor) -> None:
    """Add one batch of rows to every open count."""
    totals = torch.stack([(~empty).sum(), (negative & ~empty).sum(), (small & ~empty).sum()]).tolist()
    for counts in _active:
        counts.rows += int(totals[0])
        counts.negative += int(totals[1])
        counts.guarded += int(totals[2])


def count_clamped(keys: Tensor) -> None:
    """Add the keys that are marked to every open count."""
    number = int(keys.sum())
    for counts in _active:
        counts.clamped += number
