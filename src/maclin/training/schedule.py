"""What happens at which step: the learning rate, and the seeds of what is drawn; functions of the step alone.

Nothing is carried from step to step, so a training that goes on at step n has no way of differing from one that was
never interrupted.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "one_cycle", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "one_cycle", "constant")

_FIRST, _LAST = 1 / 25, 1e-4 / 25  # of the largest rate, where one_cycle begins and ends


def rate(step: int, steps: int, schedule: Schedule, warm_up: float) -> float:
    """Factor of the learning rate at a step.

    A linear rise over the first ``warm_up`` of the steps, then down: ``linear`` and ``cosine`` to 0, ``constant`` not
    at all. ``one_cycle`` rises and falls along a cosine, from 1/25 over 1 to 1/250,000, with a momentum that stays.

    Args:
        step: from 0.
        steps: of the whole training.
        schedule: one of ``SCHEDULES``.
        warm_up: share of the steps.
    """
    rise = max(round(warm_up * steps), 1)
    if schedule == "one_cycle":
        if step < rise:
            return _between(_FIRST, 1.0, step / rise)
        return _between(1.0, _LAST, (step - rise) / max(steps - 1 - rise, 1))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(steps - rise, 1)
    if schedule == "linear":
        return 1.0 - done
    return 1.0 if schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * done))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers, such that neighbours have nothing in common (splitmix64 of each in turn)."""
    mask = 2**64 - 1
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1  # what torch takes as a seed without a sign
