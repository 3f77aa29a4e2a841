"""Checks of settings that the studies share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..core.errors import OptionError


def check_known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Refuse unknown names, a name given twice, and none at all."""
    wrong = [name for name in given if name not in known]
    if wrong or not given:
        raise OptionError(f"wanted {option} among {', '.join(known)}, got {', '.join(wrong) or 'none'}")
    if len(set(given)) < len(given):
        raise OptionError(f"wanted each of the {option} once, got {', '.join(given)}")


def check_increasing(option: str, given: Sequence[int], least: int) -> None:
    """Refuse numbers that are not in increasing order, below ``least``, or none at all."""
    if not given or min(given) < least or list(given) != sorted(set(given)):
        raise OptionError(f"wanted increasing {option} from {least} on, got {list(given)}")


def check_positive(job: Any, options: Sequence[str]) -> None:
    """Refuse settings that are not above 0; whole numbers are then at least 1."""
    for option in options:
        if not getattr(job, option) > 0:
            raise OptionError(f"wanted a positive {option}, got {getattr(job, option)}")
