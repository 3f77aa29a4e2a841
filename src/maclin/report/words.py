"""Numbers as people read them: milliseconds, bytes, percentages; the same in every rendering."""

from __future__ import annotations

import math

MISSING = "not measured"
"""What stands where a figure was not measured."""


def milliseconds(value: float | None) -> str:
    """A latency in ms, or in seconds from one second on: ``12.3 ms``, ``4.56 s``.

    Args:
        value: milliseconds; None where not measured.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{_three(value / 1000)} s" if value >= 999.5 else f"{_three(value)} ms"


def size(value: float | None) -> str:
    """A number of bytes in the largest binary unit that leaves at least one: ``1.5 MiB``.

    Args:
        value: bytes; None where not measured.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = 0
    while abs(value) >= 1023.5 and step < len(units) - 1:
        value, step = value / 1024, step + 1
    return f"{value:.0f} B" if step == 0 else f"{_three(value)} {units[step]}"


def percent(value: float | None) -> str:
    """A share as percent, with one decimal where it is close to 0 or to 1: ``97%``, ``99.4%``."""
    if value is None or not math.isfinite(value):
        return MISSING
    digits = 0 if value in (0, 1) or 0.1 <= value <= 0.9 or float(100 * value).is_integer() else 1
    return f"{100 * value:.{digits}f}%"


def figure(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of decimals; very large ones in powers of ten."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.1e}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated: ``16,384``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def money(value: float | None, currency: str) -> str:
    """An amount: ``1,234 EUR`` from one hundred on, ``12.34 EUR`` below."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f} {currency}" if abs(value) >= 100 else f"{value:,.2f} {currency}"


def times(ratio: float) -> str:
    """How much faster, from new over old latency: ``1.4 times as fast``, ``1.2 times as slow``."""
    if not math.isfinite(ratio) or ratio <= 0:
        return "not comparable in speed"
    factor, word = (1 / ratio, "fast") if ratio <= 1 else (ratio, "slow")
    return f"{factor:.2f} times as {word}" if factor < 10 else f"{factor:.0f} times as {word}"


def plural(number: int, noun: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _three(value: float) -> str:
    """Three significant digits, never in powers of ten for what is plainly readable."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}") if abs(value) < 1000 else value
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"
