"""Whether a mechanism computes what its formula says, asked before its speed is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maclin.core import reference
from maclin.core.mechanisms import FeatureMechanism, Mechanism

_LENGTHS = (48,)  # tokens
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_GRADIENT = 2.0  # times that for gradients, which are products of more rounded numbers


def oracle_check(
    subject: Callable[..., object],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backward: bool = False,
    lengths: Sequence[int] = _LENGTHS,
    causal: bool | None = None,
) -> str | None:
    """Compare a mechanism with the slow float64 oracle of its formula, on short sequences.

    Args:
        subject: a mechanism; anything else, and a mechanism that has no oracle here, passes unasked.
        dtype: of q, k and v.
        device: where the mechanism is.
        backward: compare the gradients of q, k and v as well.
        lengths: tokens. Beyond the width of a head only what is a feature map is asked, since only its oracle holds
            and is quick there.
        causal: ask the causal form only, or the other only; None asks each that there is.

    Returns:
        None, or in one sentence how far off the mechanism is: ||out - oracle|| / ||oracle|| beyond the tolerance
        of the dtype (1e-4 in float32, twice that for gradients), the denominator's floor included.
    """
    if not isinstance(subject, Mechanism):
        return None
    is_map = isinstance(subject, FeatureMechanism) and subject.name not in _ORACLES
    oracle = _features if is_map else _ORACLES.get(subject.name)
    if oracle is None:
        return None
    forms = [*([False] if subject.bidirectional else []), *([True] if subject.causal else [])]
    for length in lengths:
        if not is_map or _is_gated(subject):
            length = min(subject.head_dim, length)  # no more keys than slots, where slots are as many
        for is_causal in forms if causal is None else [form for form in forms if form == causal]:
            wrong = _difference(subject, oracle, length, is_causal, backward, dtype, device)
            if wrong is not None:
                return wrong
    return None


def _difference(
    mech: Mechanism,
    oracle: _Oracle,
    length: int,
    is_causal: bool,
    backward: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> str | None:
    """In one sentence by how much out or a gradient is beyond what is allowed, or None."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, mech.num_heads, length, mech.head_dim, generator=generator)
    k, v = torch.randn(2, 1, mech.num_kv_heads, length, mech.head_dim, generator=generator)
    upstream = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(device)
    q, k, v = qkv = tuple(x.to(device, dtype).requires_grad_(backward) for x in (q, k, v))
    with torch.set_grad_enabled(backward):
        wanted = oracle(mech, q, k, v, is_causal)
        got = mech(q, k, v, is_causal=is_causal)
        pairs = {"": (got, wanted)}
        if backward:
            # q of mean, for one, has no gradient
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            theirs = torch.autograd.grad(wanted, qkv, upstream.to(wanted), **options)
            ours = torch.autograd.grad(got, qkv, upstream.to(got), **options)
            pairs |= {f" in the gradient of {name}": pair for name, *pair in zip("qkv", ours, theirs, strict=True)}
    for what, (ours, wanted) in pairs.items():
        allowed = _TOLERANCE[dtype] * (_GRADIENT if what else 1.0)
        scale = wanted.double().norm().item() or 1.0
        error = (ours.double() - wanted.double()).norm().item() / scale
        if not error <= allowed:  # NaN is not
            causal = "causal " if is_causal else ""
            return (
                f"{mech.name} is off its {causal}oracle by {error:.2g}{what} at {length} tokens; allowed is {allowed:g}"
            )
    return None


def _is_gated(mech: Any) -> bool:
    return mech.features(mech._scale(None)).log_gate is not None


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


_Oracle = Callable[[Any, Tensor, Tensor, Tensor, bool], Tensor]
_ORACLES: dict[str, _Oracle] = {
    "softmax": _softmax,
    "efficient": _efficient,
    "mean": _mean,
    "revisited_linformer": _softmax,  # exact while there are no more keys than slots
}
