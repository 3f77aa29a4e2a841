"""Head by head: what a mechanism's kernel is given, how well it estimates it, and whether it is of any use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maclin.adopt.calibrate import short_config
from maclin.adopt.capture import token_mask
from maclin.adopt.exact import actual_scale, allowed_keys, exact_attention, uniform_attention
from maclin.adopt.hosts.base import AttentionCall
from maclin.adopt.measuring.candidates import relative, squares, sums
from maclin.adopt.measuring.feature_statistics import look
from maclin.core.errors import MaclinError
from maclin.core.kernels import Kernel
from maclin.core.kernels import kernel as kernel_of
from maclin.core.mechanisms import Mechanism
from maclin.core.norms import unit_norm
from maclin.core.reference import weighted_values
from maclin.core.statistics import guarded
from maclin.records import Diagnosis, HeadDiagnosis

_NO_BETTER = 0.999  # of the error of averaging
_NORMS = 512  # ranks of the norms of queries and of keys whose products are looked at
_PAIRS = 1 << 22  # of query and key at once, in float64


@torch.no_grad()
def diagnose(
    mech: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Diagnosis:
    """What a mechanism makes of given q, k and v, head by head, and why.

    Two errors add up: that of the mechanism's own kernel against softmax attention (ppSBN flattens it, a temperature
    sharpens it), and that of the features against the kernel (a large radius is more than they can follow). Both are
    measured apart where the mechanism has a kernel. Mask, causality and scale are as in a call.

    Args:
        mech: any mechanism; it stays as it is and is looked at in eval mode.
        q: queries (B, H, N, D), best of sequences that it was not calibrated on.
        k: keys (B, Hk, S, D).
        v: values (B, Hk, S, Dv).
        key_mask: (B, S) bool, True = attend.
        is_causal: as in a call.
        scale: as in a call.

    Returns:
        The record; ``print`` shows it as a table. A field is None where its notion does not exist for this
        mechanism, and ``reasons`` says why.

    Raises:
        InputError: shapes that do not fit the mechanism, or an exact output of zero.
        CapabilityError: the mechanism lacks what was asked for.

    Cost: that of exact attention, N x S per head.

    Example:
        >>> print(maclin.diagnose(mech, q, k, v, mask))
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    mech.check_inputs(q, k, v, key_mask)
    call = AttentionCall(mech.name, q, k, v, key_mask, is_causal, scale)
    modes = [(module, module.training) for module in mech.modules()]
    try:
        mech.eval()
        return _diagnosed(mech, call)
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class _View:
    """What a mechanism's kernel is given: f(scale x y) is the weight of a pair, before it is normalised."""

    x: Tensor  # (B, H, N, D)
    y: Tensor  # (B, Hk, S, D)
    kernel: Kernel | None
    scale: float


def _view(mech: Mechanism, call: AttentionCall) -> tuple[_View, str]:
    """The view, and why there is no kernel in it, or how the radius is to be read."""
    scale = mech._scale(call.scale)
    own = getattr(mech, "kernel", None)
    normalised = getattr(mech, "normalised", None)
    if normalised is not None:
        x, y = normalised(call.q, call.k, call.scale)
        return _View(x, y, own, scale), ""
    if mech.name == "rfa" and mech.bidirectional:
        return _View(unit_norm(call.q), unit_norm(call.k), kernel_of("exp"), scale), ""
    if own is None and mech.name in ("softmax", "favor"):
        own = kernel_of("exp")
    if own is not None:
        return _View(call.q, call.k, own, scale), ""
    return (
        _View(call.q, call.k, None, actual_scale(call)),
        f"{mech.name} has no kernel of the dot product, so there is nothing to predict, no error to it and no gap; the "
        "radius is that of q and k as they are",
    )


def _diagnosed(mech: Mechanism, call: AttentionCall) -> Diagnosis:
    heads, key_heads = call.q.shape[1], call.k.shape[1]
    self_attention = call.q.shape[2] == call.k.shape[2]
    real = token_mask(call) if self_attention else torch.ones_like(call.q[:, 0, :, 0], dtype=torch.bool)
    with guarded() as counts:
        out = mech(call.q, call.k, call.v, key_mask=call.key_mask, is_causal=call.is_causal, scale=call.scale)
    exact = exact_attention(call)
    total, by_head = relative(squares(out - exact.out, real), squares(exact.out, real))
    uniform, uniform_by_head = relative(squares(uniform_attention(call) - exact.out, real), squares(exact.out, real))
    view, why = _view(mech, call)
    reasons = [why] if why else []
    to_kernel: tuple[float, ...] | None = None
    gap: tuple[float, ...] | None = None
    if view.kernel is not None:
        ideal = _kernel_attention(view, call)
        post = getattr(mech, "post", None)
        ideal = ideal if post is None else post(ideal)
        to_kernel = relative(squares(out - ideal, real), squares(ideal, real))[1]
        gap = relative(squares(ideal - exact.out, real), squares(exact.out, real))[1]
    predicted, why = _predicted(mech, call)
    reasons += [why] if why and view.kernel is not None else []
    seen = look(mech, call, real)
    if isinstance(seen, str):
        reasons.append(seen)
    radii = _radii(mech, view, call, real)
    several = real & (exact.attended > 1)
    entropy = (
        sums(exact.entropy / exact.attended.clamp_min(2).log()[:, None], several) / several.sum().clamp_min(1).cpu()
    )
    rows: list[HeadDiagnosis] = []
    for head in range(heads):
        row = HeadDiagnosis(
            head,
            *radii[head],
            entropy_ratio=float(entropy[head]),
            predicted_rel_error=None if predicted is None else predicted[head * key_heads // heads],
            kernel_rel_error=None if to_kernel is None else to_kernel[head],
            kernel_gap=None if gap is None else gap[head],
            softmax_rel_error=by_head[head],
            uniform_rel_error=uniform_by_head[head],
            negative_similarity_share=None if isinstance(seen, str) else seen.negative_similarities[head],
            negative_share=None if isinstance(seen, str) else seen.negative[head],
            guarded_share=None if isinstance(seen, str) else seen.guarded[head],
        )
        rows.append(replace(row, warning=_warning(row)))
    keys = call.k.shape[2] * call.k.shape[0] if call.key_mask is None else int(call.key_mask.sum())
    features = getattr(mech, "map", mech)
    return Diagnosis(
        mechanism=mech.name,
        config=short_config(mech),
        num_features=getattr(features, "num_features", None),
        num_sequences=int(real.any(1).sum()),
        num_tokens=int(real.sum()),
        softmax_rel_error=total,
        uniform_rel_error=uniform,
        clamped_share=counts.clamped / max(keys * key_heads, 1),
        heads=tuple(rows),
        reasons=tuple(reasons),
    )


def _warning(row: HeadDiagnosis) -> str:
    found: list[str] = []
    if row.softmax_rel_error >= _NO_BETTER * row.uniform_rel_error:
        text = f"no better than averaging the values ({row.softmax_rel_error:.3g} against {row.uniform_rel_error:.3g})"
        if row.kernel_gap is not None and row.kernel_gap >= _NO_BETTER * row.uniform_rel_error:
            text += ", and neither is its kernel: normalisation or temperature take what tells keys apart"
        elif row.kernel_gap is not None:
            text += f", though its kernel is ({row.kernel_gap:.3g}): the features do not follow it"
        found.append(text)
    if row.negative_share is not None and row.negative_share > 0.01:
        found.append(f"{row.negative_share:.0%} of its denominators are negative")
    return "; ".join(found)


def _kernel_attention(view: _View, call: AttentionCall) -> Tensor:
    """Exact attention with the weights f(scale x y), in blocks: (B, H, N, Dv) in float64."""
    assert view.kernel is not None
    groups = call.q.shape[1] // call.k.shape[1]
    y, v = (t.double().repeat_interleave(groups, dim=1) for t in (view.y, call.v))
    step = max(1, _PAIRS // max(1, y.shape[0] * y.shape[1] * y.shape[2]))
    parts: list[Tensor] = []
    for start in range(0, view.x.shape[2], step):
        t = (view.x[:, :, start : start + step].double() @ y.mT) * view.scale
        allowed = allowed_keys(call, start, start + t.shape[2])[:, None]
        parts.append(weighted_values(view.kernel(t), v, allowed.expand_as(t)))
    return torch.cat(parts, dim=2)


def _predicted(mech: Mechanism, call: AttentionCall) -> tuple[tuple[float, ...] | None, str]:
    predict: Callable[..., tuple[float, ...]] | None = getattr(mech, "predicted_rel_error", None)
    if predict is None:
        return None, f"{mech.name} has no closed form to predict an error with"
    try:
        return predict(call.q, call.k, call.v, call.key_mask, is_causal=call.is_causal, scale=call.scale), ""
    except MaclinError as error:
        return None, f"no prediction: {error}"


def _radii(mech: Mechanism, view: _View, call: AttentionCall, real: Tensor) -> list[tuple[float, float, float]]:
    """Median, 99th percentile and maximum of |x||y| of each head, centred where the features are."""
    root = math.sqrt(view.scale)
    groups = call.q.shape[1] // call.k.shape[1]
    attended = torch.ones_like(call.k[:, 0, :, 0], dtype=torch.bool) if call.key_mask is None else call.key_mask
    basis = getattr(getattr(mech, "map", None), "basis", None)
    found: list[tuple[float, float, float]] = []
    for head in range(call.q.shape[1]):
        x, y = view.x[:, head][real].double() * root, view.y[:, head // groups][attended].double() * root
        if basis is not None:
            centres = basis(head // groups, view.scale)
            x, y = x - centres.q_centre.to(x), y - centres.k_centre.to(y)
        of_x, of_y = (_ranked(t.norm(dim=-1)) for t in (x, y))
        products = (of_x[:, None] * of_y).flatten()
        middle, high = torch.quantile(products, products.new_tensor([0.5, 0.99])).tolist()
        found.append((middle, high, float(products.max())))
    return found


def _ranked(norms: Tensor) -> Tensor:
    """The norms at evenly spread ranks, the largest included."""
    ordered = norms.sort().values
    return ordered[torch.linspace(0, len(ordered) - 1, min(len(ordered), _NORMS)).round().long()]
