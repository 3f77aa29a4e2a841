"""Conformance checks for mechanisms, ours and other people's.

>>> from maclin.testing import check_mechanism
>>> check_mechanism(lambda: MyMechanism(head_dim=16, num_heads=4, num_kv_heads=2))

A mechanism is any module under the call contract of ``maclin.Mechanism``, with attributes ``head_dim``,
``num_heads``, ``num_kv_heads`` and ``causal``. Each check compares it with itself under a change that must
not matter, with finite differences in float64, or, where it is a feature map under one normaliser, with all pairs of
its own features, the floor of the denominators included. What its features are is checked by the oracles of
``maclin.core.reference``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .bench import largest_intermediate
from .core import mechanisms, reference
from .core.errors import CapabilityError, InputError, MaclinError
from .core.mechanisms import FeatureMechanism

_TOLERANCE = 1e-9  # float64: what must not matter may change the last digits, no more
_LENGTH = 150  # more than one causal chunk


class ConformanceError(MaclinError, AssertionError):
    """A mechanism broke its contract; the message lists every check that failed."""


@dataclass(frozen=True)
class CheckResult:
    """One check: its name, how far off the mechanism was, and what is allowed.

    ``reason`` is set where the check does not apply, by a declared exception or a missing capability.
    """

    name: str
    passed: bool
    measured: float | None = None
    allowed: float | None = None
    reason: str = ""


@dataclass
class _Subject:
    factory: Callable[[], nn.Module]
    mech: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.mech = self.factory().double().eval()
        for name in ("head_dim", "num_heads", "num_kv_heads"):
            _size(self.mech, name)

    @property
    def causal(self) -> bool:
        return bool(getattr(self.mech, "causal", False))

    def inputs(self, n: int, s: int, batch: int = 2, dv: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        d = _size(self.mech, "head_dim")
        h, hk = _size(self.mech, "num_heads"), _size(self.mech, "num_kv_heads")

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return normal(batch, h, n, d), normal(batch, hk, s, d), normal(batch, hk, s, d + 3 if dv is None else dv)

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of is_causal that the mechanism understands."""
        bidirectional = bool(getattr(self.mech, "bidirectional", True))
        return (*((False,) if bidirectional else ()), *((True,) if self.causal else ()))

    def __call__(self, *args: Tensor, **kwargs: Any) -> Any:
        return self.mech(*args, **{"is_causal": self.modes[0], **kwargs})


def check_mechanism(
    factory: Callable[[], nn.Module], *, exceptions: Mapping[str, str] | None = None
) -> tuple[CheckResult, ...]:
    """Run every conformance check that applies, with torch's generator seeded, so that equal runs have equal results.

    Args:
        factory: builds the mechanism; called several times, and each call may draw anew.
        exceptions: name of a check -> reason why it does not apply; None takes those of the registry's row, if
            the mechanism is registered.

    Returns:
        The results, declared exceptions and missing capabilities included.

    Raises:
        ConformanceError: a check failed; the message lists all that did, with figures.
        InputError: an exception from a check that does not exist, or a mechanism without its sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        subject = _Subject(factory)
        results = _run(subject, dict(_registered_exceptions(subject.mech) if exceptions is None else exceptions))
    failed = [result for result in results if not result.passed]
    if failed:
        lines = [
            f"{r.name}: {r.reason}" if r.measured is None else f"{r.name}: {r.measured:.3g}, allowed {r.allowed:.3g}"
            for r in failed
        ]
        raise ConformanceError(f"{type(subject.mech).__name__} fails {len(failed)} checks:\n  " + "\n  ".join(lines))
    return tuple(results)


def _run(subject: _Subject, declared: Mapping[str, str]) -> list[CheckResult]:
    unknown = [name for name in declared if name not in _CHECKS]
    if unknown:
        raise InputError(f"check_mechanism: exceptions names no check {unknown[0]!r}; known are {', '.join(_CHECKS)}")
    results: list[CheckResult] = []
    for name, check in _CHECKS.items():
        if name in declared:
            results.append(CheckResult(name, True, reason=declared[name]))
            continue
        if name in _CAUSAL_ONLY and not subject.causal:
            results.append(CheckResult(name, True, reason="not a causal mechanism"))
            continue
        if name == "own_features" and not _sums_features(subject.mech):
            results.append(CheckResult(name, True, reason="not a feature map under one normaliser"))
            continue
        try:
            measured, allowed = check(subject)
            results.append(CheckResult(name, measured <= allowed, measured, allowed))
        except (MaclinError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            results.append(CheckResult(name, False, reason=f"raised {type(error).__name__}: {error}"))
    return results


def _shapes(subject: _Subject) -> tuple[float, float]:
    wrong = 0
    for n, s, causal in ((7, 7, False), (5, 11, False), (11, 5, False), (5, 11, True), (1, 1, False), (1, 1, True)):
        if causal not in subject.modes:
            continue
        q, k, v = subject.inputs(n, s)
        out = subject(q, k, v, is_causal=causal)
        wrong += out.shape != (*q.shape[:-1], v.shape[-1]) or out.dtype != v.dtype or not bool(out.isfinite().all())
    return wrong, 0


def _padding(left: bool) -> Callable[[_Subject], tuple[float, float]]:
    def check(subject: _Subject) -> tuple[float, float]:
        q, k, v = subject.inputs(_LENGTH, _LENGTH, batch=1)
        junk = [torch.randn_like(x[:, :, :19]) * 30 for x in (k, v)]
        pair = (lambda pad, x: [pad, x]) if left else (lambda pad, x: [x, pad])
        padded = [torch.cat(pair(pad, x), dim=2) for pad, x in zip(junk, (k, v), strict=True)]
        mask = torch.ones(1, _LENGTH + 19, dtype=torch.bool)
        mask[:, slice(0, 19) if left else slice(_LENGTH, None)] = False
        pad_q = torch.randn_like(q[:, :, :19])
        q_padded = torch.cat(pair(pad_q, q), dim=2)
        here = slice(19, None) if left else slice(0, _LENGTH)
        worst = 0.0
        for causal in subject.modes:
            whole = subject(q, k, v, is_causal=causal)
            worst = max(worst, _off(subject(q_padded, *padded, key_mask=mask, is_causal=causal)[:, :, here], whole))
        return worst, _TOLERANCE

    return check


def _batch_independence(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(_LENGTH, _LENGTH, batch=3)
    k, v = k.clone(), v.clone()
    k[1:] *= 50.0
    v[1:] *= 1e3
    mask = torch.rand(3, _LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    worst = 0.0
    for causal in subject.modes:
        together = subject(q, k, v, key_mask=mask, is_causal=causal)
        alone = subject(q[:1], k[:1], v[:1], key_mask=mask[:1], is_causal=causal)
        worst = max(worst, _off(together[:1], alone))
    return worst, _TOLERANCE


def _causal_leak(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(_LENGTH, _LENGTH)
    before = subject(q, k, v, is_causal=True)
    worst = 0.0
    for cut in (1, 64, 128, 140):
        k_other, v_other = k.clone(), v.clone()
        k_other[:, :, cut:] = 25.0 * k_other[:, :, cut:].flip(0) + 3.0
        v_other[:, :, cut:] = 1e6
        worst = max(worst, _off(subject(q, k_other, v_other, is_causal=True)[:, :, :cut], before[:, :, :cut]))
    return worst, _TOLERANCE


def _causal_alignment(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(_LENGTH, _LENGTH)
    whole = subject(q, k, v, is_causal=True)
    return _off(subject(q[:, :, -17:], k, v, is_causal=True), whole[:, :, -17:]), _TOLERANCE


def _chunked_is_recurrent(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(_LENGTH, _LENGTH)
    mask = torch.rand(2, _LENGTH, generator=torch.Generator().manual_seed(2)) > 0.2
    whole = subject(q, k, v, key_mask=mask, is_causal=True)
    worst = 0.0
    for pieces in ([70, 40, 40], [1] * _LENGTH):
        state, start, parts = None, 0, []
        for size in pieces:
            at = slice(start, start + size)
            out, state = subject(
                q[:, :, at],
                k[:, :, at],
                v[:, :, at],
                key_mask=mask[:, at],
                is_causal=True,
                state=state,
                return_state=True,
            )
            parts.append(out)
            start += size
        worst = max(worst, _off(torch.cat(parts, dim=2), whole))
    return worst, _TOLERANCE


def _state_is_batch_first(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(12, 12, batch=3)
    _, state = subject(q, k, v, is_causal=True, return_state=True)
    order = torch.tensor([2, 0, 0])  # a beam reorder
    moved = tuple(x[order] for x in state)
    more = subject.inputs(2, 2, batch=3, seed=1)
    reordered = subject(*more, is_causal=True, state=moved)
    straight = subject(*(torch.cat([x[order], y], dim=2) for x, y in zip((q, k, v), more, strict=True)), is_causal=True)
    return _off(reordered, straight[:, :, -2:]), _TOLERANCE


def _determinism(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(33, 33)
    before = {name: x.clone() for name, x in subject.mech.state_dict().items()}
    first, second = subject(q, k, v), subject(q, k, v)
    changed = sum(not torch.equal(x, before[name]) for name, x in subject.mech.state_dict().items())
    return float(not torch.equal(first, second)) + changed, 0


def _masked_rows(subject: _Subject) -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in subject.inputs(33, 33))
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1] = False
    mask[0, :9] = False
    worst = 0.0
    for causal in subject.modes:
        out = subject(q, k, v, key_mask=mask, is_causal=causal)
        nothing = [out[1], *([out[0, :, :9]] if causal else [])]
        grads = torch.autograd.grad(out.square().sum(), (q, k, v), allow_unused=True)
        bad = sum(int((~g.isfinite()).sum()) for g in grads if g is not None) + int((~out.isfinite()).sum())
        worst = max(worst, bad, *(float(rows.detach().abs().max()) for rows in nothing))
    return worst, 0


def _gradients(subject: _Subject) -> tuple[float, float]:
    mech = copy.deepcopy(subject.mech)
    q, k, v = subject.inputs(9, 14)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 11:] = False
    leaves = [q, k, v, *mech.parameters()]
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, q.shape[1], 9, v.shape[-1], dtype=torch.float64, generator=generator)
    worst = 0.0
    for causal in subject.modes:

        def loss(causal: bool = causal) -> Tensor:
            return (mech(q, k, v, key_mask=mask, is_causal=causal) * weights).sum()

        for leaf in leaves:
            leaf.requires_grad_(True)
        grads = torch.autograd.grad(loss(), leaves, allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
            slope = 0.0 if grad is None else float((grad * direction).sum())
            # the best of three steps: too long a step is off by its square, too short a one by rounding
            worst = max(worst, min(_slope_error(loss, leaf, direction, slope, step) for step in (1e-5, 1e-6, 1e-7)))
    return worst, 1e-6


@torch.no_grad()
def _slope_error(loss: Callable[[], Tensor], leaf: Tensor, direction: Tensor, slope: float, step: float) -> float:
    """How far a slope is from the central difference of the loss along a direction, relative to the larger of 1."""
    leaf.add_(direction, alpha=step)
    high = loss()
    leaf.sub_(direction, alpha=2 * step)
    low = loss()
    leaf.add_(direction, alpha=step)
    measured = float((high - low) / (2 * step))
    return abs(slope - measured) / max(abs(measured), 1.0)


def _half_precision(subject: _Subject) -> tuple[float, float]:
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(subject.mech).to(dtype)
        wide = copy.deepcopy(half).double()  # the same rounded parameters
        for causal in subject.modes:
            q, k, v = subject.inputs(_LENGTH, _LENGTH)
            exact = wide(q, k, v, is_causal=causal)
            rounded = [x.to(dtype) for x in (q, k, v)]
            got = half(*rounded, is_causal=causal)
            if got.dtype != dtype:
                return math.inf, 2.0
            # the least that half precision can do: round the inputs and the output, and be exact in between
            naive = wide(*(x.double() for x in rounded), is_causal=causal).to(dtype)
            worst = max(worst, _off(got.double(), exact) / max(_off(naive.double(), exact), 1e-12))
    return worst, 2.0


def _state_dict(subject: _Subject) -> tuple[float, float]:
    other = subject.factory().double().eval()
    other.load_state_dict(subject.mech.state_dict())
    q, k, v = subject.inputs(33, 33)
    return float(not torch.equal(other(q, k, v, is_causal=subject.modes[0]), subject(q, k, v))), 0


def _grouped_heads(subject: _Subject) -> tuple[float, float]:
    heads, key_heads = (_size(subject.mech, name) for name in ("num_heads", "num_kv_heads"))
    q, k, v = subject.inputs(21, 33)
    q = q[:, :: heads // key_heads].repeat_interleave(heads // key_heads, dim=1)
    out = subject(q, k, v)
    return _off(out, out[:, :: heads // key_heads].repeat_interleave(heads // key_heads, dim=1)), _TOLERANCE


def _sums_features(mech: nn.Module) -> bool:
    """Whether out is the sum of phi(q) phi(k) v over the sum of phi(q) phi(k), so that it follows from the features."""
    if not isinstance(mech, FeatureMechanism):
        return False
    features = mech.features(mech._scale(None))
    return features.normaliser == "sum" and features.log_gate is None


@torch.no_grad()
def _own_features(subject: _Subject) -> tuple[float, float]:
    mech = subject.mech
    assert isinstance(mech, FeatureMechanism)
    q, k, v = subject.inputs(_LENGTH, _LENGTH)
    mask = torch.rand(2, _LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3
    worst = 0.0
    for length in (1, 3.0):  # long queries, so that truncated series reach their floor
        features, phi_q, phi_k = mech.features(mech._scale(None)), mech.query_map(length * q), mech.feature_map(k)
        for causal in subject.modes:
            wanted = reference.feature_attention(phi_q, phi_k, v, key_mask=mask, is_causal=causal, floor=features.floor)
            wanted = wanted if features.post is None else features.post(wanted)
            worst = max(worst, _off(subject(length * q, k, v, key_mask=mask, is_causal=causal), wanted))
    return worst, 1e-7  # a denominator in which much cancels


def _packed(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(60, 60, batch=1)
    worst = 0.0
    for causal in subject.modes:
        got = subject(q, k, v, cu_seqlens=torch.tensor([0, 13, 13, 60]), is_causal=causal)
        alone = [subject(*(x[:, :, a:b] for x in (q, k, v)), is_causal=causal) for a, b in ((0, 13), (13, 60))]
        worst = max(worst, _off(got, torch.cat(alone, dim=2)))
    return worst, _TOLERANCE


def _linear_memory(subject: _Subject) -> tuple[float, float]:
    mech = copy.deepcopy(subject.mech).float()
    largest: list[int] = []
    for n in (1024, 4096):
        # values as wide as keys: fused kernels want that, and fall back to all weights otherwise
        q, k, v = (x.float() for x in subject.inputs(n, n, batch=1, dv=_size(mech, "head_dim")))
        for causal in subject.modes:  # once before: what is made once and kept does not count
            mech(q, k, v, is_causal=causal)
        calls = (partial(mech, q, k, v, is_causal=causal) for causal in subject.modes)
        largest.append(max(largest_intermediate(call) for call in calls))
    return largest[1] / largest[0], 4.0


def _refusals(subject: _Subject) -> tuple[float, float]:
    q, k, v = subject.inputs(5, 5)
    long = subject.inputs(7, 5)
    calls: list[tuple[type[Exception], Callable[[], Any]]] = [
        (CapabilityError, lambda: subject(q, k, v, is_causal=False, return_state=True)),
        (CapabilityError, lambda: subject(*long, is_causal=True)),
        (InputError, lambda: subject(q[..., :-1], k, v)),
        (InputError, lambda: subject(q[:, :-1], k, v)),
        (InputError, lambda: subject(q, k[:, :, :-1], v)),
        (InputError, lambda: subject(q.float(), k, v)),
        (InputError, lambda: subject(q, k, v, key_mask=torch.ones(2, 5))),
        (InputError, lambda: subject(q, k, v, key_mask=torch.ones(2, 4, dtype=torch.bool))),
        (InputError, lambda: subject(q, k, v, scale=0.0)),
        (InputError, lambda: subject(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 9]))),
    ]
    calls += [
        (CapabilityError, lambda causal=causal: subject(q, k, v, is_causal=causal))
        for causal in (False, True)
        if causal not in subject.modes
    ]
    silent = 0
    for wanted, call in calls:
        try:
            call()
        except wanted:
            continue
        silent += 1
    return silent, 0


_CHECKS: dict[str, Callable[[_Subject], tuple[float, float]]] = {
    "shapes": _shapes,
    "right_padding": _padding(left=False),
    "left_padding": _padding(left=True),
    "batch_independence": _batch_independence,
    "causal_leak": _causal_leak,
    "causal_alignment": _causal_alignment,
    "chunked_is_recurrent": _chunked_is_recurrent,
    "state_is_batch_first": _state_is_batch_first,
    "determinism": _determinism,
    "masked_rows": _masked_rows,
    "gradients": _gradients,
    "half_precision": _half_precision,
    "state_dict": _state_dict,
    "grouped_heads": _grouped_heads,
    "own_features": _own_features,
    "packed": _packed,
    "linear_memory": _linear_memory,
    "refusals": _refusals,
}
_CAUSAL_ONLY = ("causal_leak", "causal_alignment", "chunked_is_recurrent", "state_is_batch_first")


def _off(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius distance; infinite where something is not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    if not bool(got.isfinite().all()):
        return math.inf
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _size(mech: nn.Module, name: str) -> int:
    value = getattr(mech, name, None)
    if not isinstance(value, int):
        raise InputError(f"check_mechanism: {type(mech).__name__} has no integer attribute {name!r}")
    return value


def _registered_exceptions(mech: nn.Module) -> Mapping[str, str]:
    name = getattr(mech, "name", None)
    if name not in mechanisms.names() or type(mech) is not mechanisms.row(name).cls:
        return {}
    return {
        check.partition(":")[0]: reason
        for check, reason in mechanisms.row(name).exceptions.items()
        if check.partition(":")[2] in ("", getattr(mech, "projection", ""))
    }
