"""Whether a mechanism computes what its formula says, asked before its speed is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maclin.core import reference
from maclin.core.mechanisms import FeatureMechanism, Mechanism

_LENGTH = 48  # tokens at most
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def oracle_check(
    subject: Callable[..., object], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> str | None:
    """Compare a mechanism with the slow float64 oracle of its formula, on a short sequence.

    Args:
        subject: a mechanism; anything else, and a mechanism that has no oracle here, passes unasked.
        dtype: of q, k and v.
        device: where the mechanism is.

    Returns:
        None, or in one sentence how far off the mechanism is: ||out - oracle|| / ||oracle|| beyond the tolerance
        of the dtype (1e-4 in float32).
    """
    if not isinstance(subject, Mechanism):
        return None
    oracle = _ORACLES.get(subject.name, _features if isinstance(subject, FeatureMechanism) else None)
    if oracle is None:
        return None
    length = min(_LENGTH, subject.head_dim)  # no more keys than slots, where slots are as many as the head is wide
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, subject.num_heads, length, subject.head_dim, generator=generator)
    k, v = torch.randn(2, 1, subject.num_kv_heads, length, subject.head_dim, generator=generator)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    with torch.no_grad():
        wanted = oracle(subject, q, k, v)
        got = subject(q, k, v).to(wanted)
    error = ((got - wanted).norm() / wanted.norm()).item()
    allowed = _TOLERANCE[dtype]
    if error <= allowed:  # NaN is not
        return None
    return f"{subject.name} is off its oracle by {error:.2g} at {length} tokens; allowed is {allowed:g}"


def _softmax(mech: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.softmax_attention(q, k, v)


def _efficient(mech: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.efficient_attention(q, k, v, normalisation=mech.normalisation)


def _mean(mech: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.softmax_attention(torch.zeros_like(q), k, v)


def _features(mech: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Features are the mechanism's own; what is checked is what it does with them."""
    out = reference.feature_attention(mech.query_map(q), mech.feature_map(k), v)
    post = getattr(mech, "post", None)
    return out if post is None else post(out)


_ORACLES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": _softmax,
    "efficient": _efficient,
    "mean": _mean,
    "revisited_linformer": _softmax,  # exact while there are no more keys than slots
}
