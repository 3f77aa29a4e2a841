"""Where compiled code is left: what is sampled, counted and timed differs from call to call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@functools.cache
def outside() -> Callable[..., Any]:
    """``outside()(function, *arguments)`` calls the function where torch.compile compiles nothing of it.

    Made when it is wanted, because it imports the whole compiler.
    """
    return cast(Callable[..., Any], torch.compiler.disable(_call))
