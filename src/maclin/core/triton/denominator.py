"""The denominator policy of ``core.contract`` for blocks of rows: its floor, its guard, and the gradients of both."""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def keep_floor(numerator, denominator, n0, d0, floor):
    """Shrink what is beyond the last feature until the denominator is ``floor`` of what this feature gives it."""
    least = floor * d0
    short = denominator < least
    share = tl.where(short, (d0 - least) / tl.where(short, d0 - denominator, 1.0), 1.0)
    return n0 + share[:, None] * (numerator - n0), tl.where(short, least, denominator)


@triton.jit
def guarded(denominator, magnitude, FAMILY: tl.constexpr):
    """The denominator under the policy: at least 8 units of rounding of ``magnitude``; 1 where no key is attended to.

    Positive features cannot cancel, so there only the rows without a key are left to guard.
    """
    if FAMILY == 0:
        least = tl.maximum(magnitude * 9.5367431640625e-07, 1.1754943508222875e-38)
        safe = tl.where(tl.abs(denominator) < least, tl.where(denominator < 0, -least, least), denominator)
        return tl.where((magnitude == 0) & (denominator == 0), 1.0, safe)
    else:
        return tl.where(denominator == 0, 1.0, denominator)


@triton.jit
def row_factors(of_out, of_n0, denominator, magnitude, d0, floor, FLOORED: tl.constexpr, FAMILY: tl.constexpr):
    """How the gradient g of a row of out reaches what it was divided from.

    Returns a, b, a_last and b_last: the gradient of the numerator is a g, of what the last feature gives it a_last g
    more; those of the denominator are b and, of the last feature's, b_last. ``of_out`` is <g, out> and ``of_n0``
    <g, n0>. A threshold that has replaced a denominator counts as a constant.
    """
    if FLOORED:
        least = floor * d0
        short = denominator < least
        gap = tl.where(short, d0 - denominator, 1.0)
        share = tl.where(short, (d0 - least) / gap, 1.0)
        used = tl.where(short, least, denominator)
        safe = guarded(used, magnitude, FAMILY)
        through = tl.where(safe == used, -of_out / safe, 0.0)
        beyond = (of_out - of_n0 / safe) / share  # <g, n - n0> / safe
        b = tl.where(short, beyond * share / gap, through)
        b_last = tl.where(short, floor * through - beyond * (1.0 - floor) * (denominator / gap) / gap, 0.0)
        return share / safe, b, (1.0 - share) / safe, b_last
    else:
        safe = guarded(denominator, magnitude, FAMILY)
        b = tl.where(safe == denominator, -of_out / safe, 0.0)
        return 1.0 / safe, b, 1.0 / safe, b
