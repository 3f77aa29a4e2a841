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
    """Compare a mechanism with the slow float64 oracle of its formula, on a short sequence, causal as well if it can.

    Args:
        subject: a mechanism; anything else, and a mechanism that has no oracle here, passes unasked.
        dtype: of q, k and v.
        device: where the mechanism is.

    Returns:
        None, or in one sentence how far off the mechanism is: ||out - oracle|| / ||oracle|| beyond the tolerance
        of the dtype (1e-4 in float32), the denominator's floor included.
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
    allowed = _TOLERANCE[dtype]
    for is_causal in (*([False] if subject.bidirectional else []), *([True] if subject.causal else [])):
        with torch.no_grad():
            wanted = oracle(subject, q, k, v, is_causal)
            got = subject(q, k, v, is_causal=is_causal).to(wanted)
        error = ((got - wanted).norm() / wanted.norm()).item()
        if not error <= allowed:  # NaN is not
            causal = "causal " if is_causal else ""
            return f"{subject.name} is off its {causal}oracle by {error:.2g} at {length} tokens; allowed is {allowed:g}"
    return None


def _softmax(mech: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return reference.softmax_attention(q, k, v, is_causal=is_causal)


def _efficient(mech: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return reference.efficient_attention(q, k, v, normalisation=mech.normalisation, is_causal=is_causal)


def _mean(mech: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return reference.softmax_attention(torch.zeros_like(q), k, v, is_causal=is_causal)


def _features(mech: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Features are the mechanism's own; what is checked is what it does with them."""
    features = mech.features(mech._scale(None))
    phi_q, phi_k = mech.query_map(q), mech.feature_map(k)
    if features.log_gate is not None:
        out = reference.gated_attention(*(x.cpu() for x in (phi_q, phi_k, v, features.log_gate(k).exp()))).to(v.device)
    else:
        out = reference.feature_attention(phi_q, phi_k, v, is_causal=is_causal, floor=features.floor)
    return out if features.post is None else features.post(out)


_ORACLES: dict[str, Callable[[Any, Tensor, Tensor, Tensor, bool], Tensor]] = {
    "softmax": _softmax,
    "efficient": _efficient,
    "mean": _mean,
    "revisited_linformer": _softmax,  # exact while there are no more keys than slots
}
