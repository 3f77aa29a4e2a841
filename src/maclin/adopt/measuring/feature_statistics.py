"""What the features of a mechanism do to single pairs and to denominators, head by head, on sampled queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maclin.adopt.exact import allowed_keys
from maclin.adopt.hosts.base import AttentionCall
from maclin.core.algebra import grouped, wide
from maclin.core.contract import Features, Reading, finish
from maclin.core.design import spread_evenly
from maclin.core.mechanisms import FeatureMechanism, Mechanism
from maclin.core.statistics import guarded

_ROWS = 128  # queries of a sequence that are looked at, spread evenly


class FeatureStatistics(NamedTuple):
    """Per query head: shares of negative similarities, and of rows with negative and with guarded denominators."""

    negative_similarities: tuple[float, ...]
    negative: tuple[float, ...]
    guarded: tuple[float, ...]


def look(mech: Mechanism, call: AttentionCall, real: Tensor) -> FeatureStatistics | str:
    """The statistics of a feature map, or in one sentence why there are none.

    Each sampled query is compared with every key it may attend to; its denominator goes through the contraction's own
    policy.

    Args:
        mech: the mechanism, in eval mode.
        call: q, k and v in float32 or better.
        real: (B, N), queries that are no padding.
    """
    if not isinstance(mech, FeatureMechanism):
        return f"{mech.name} is no feature map: it has no similarities or denominators that could be negative"
    features = mech.features(mech._scale(call.scale))
    if features.normaliser != "sum" or features.log_gate is not None:
        return f"{mech.name} as configured does not divide by a sum of similarities, so there is no sign to look at"
    heads = call.q.shape[1]
    if features.log_domain:
        none = (0.0,) * heads
        return FeatureStatistics(none, none, none)
    pairs = rows = 0
    similarities = torch.zeros(heads, dtype=torch.float64)
    negative, small = [0] * heads, [0] * heads
    for b in range(call.q.shape[0]):
        at = real[b].nonzero()[:, 0]
        at = at[spread_evenly(len(at), _ROWS).to(at.device)]
        allowed = allowed_keys(call, 0, call.q.shape[2])[b, at]
        at, allowed = at[allowed.any(-1)], allowed[allowed.any(-1)]
        if not len(at):
            continue
        phi_q, phi_k = features.query(wide(call.q[b : b + 1, :, at])), features.key(wide(call.k[b : b + 1]))
        phi_k = phi_k.masked_fill(~allowed.any(0)[:, None], 0.0)
        pairs, rows = pairs + int(allowed.sum()), rows + len(at)
        similarity = phi_q @ grouped(phi_k, heads).mT
        similarities += ((similarity < 0) & allowed).sum((0, 2, 3)).cpu()
        reading = _reading(phi_q, grouped(phi_k, heads), allowed.to(phi_k.dtype), features)
        for head in range(heads):
            with guarded() as counts:
                finish(_of_head(reading, head), None, features.floor)
            negative[head] += counts.negative
            small[head] += counts.guarded
    share = [similarities / max(pairs, 1), torch.tensor(negative) / max(rows, 1), torch.tensor(small) / max(rows, 1)]
    return FeatureStatistics(*(tuple(float(x) for x in of_heads) for of_heads in share))


def _reading(phi_q: Tensor, phi_k: Tensor, allowed: Tensor, features: Features) -> Reading:
    """What the sampled queries read, of values that are nothing: phi_q (1, H, n, M), phi_k (1, H, S, M)."""
    z = allowed @ phi_k  # (1, H, n, M): of the keys that each query may attend to
    denominator = (phi_q * z).sum(-1)
    nothing = denominator[..., None] * 0
    of_constant = (nothing, phi_q[..., -1] * z[..., -1]) if features.floor else None
    return Reading(nothing, denominator, phi_q.norm(dim=-1) * z.norm(dim=-1), None, of_constant)


def _of_head(reading: Reading, head: int) -> Reading:
    one = slice(head, head + 1)
    numerator, denominator, magnitude = (x[:, one] for x in (reading.numerator, reading.denominator, reading.magnitude))
    constant = reading.constant
    return Reading(
        numerator,
        denominator,
        magnitude,
        None,
        None if constant is None else (constant[0][:, one], constant[1][:, one]),
    )
