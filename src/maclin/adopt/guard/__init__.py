"""Watching a converted model while it serves: sampled rows, an estimate of its error, exact answers, counters."""

from maclin.adopt.guard.guard import Guard, GuardWarning, guard, unguard
from maclin.adopt.guard.options import GuardOptions
from maclin.adopt.guard.rates import guard_rates
from maclin.adopt.guard.watch import Flag

__all__ = ["Flag", "Guard", "GuardOptions", "GuardWarning", "guard", "guard_rates", "unguard"]
