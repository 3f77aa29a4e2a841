"""Which mechanism suits given q, k and v: every candidate measured on sequences that it has not learned from."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maclin.adopt.calibrate import learned, only
from maclin.adopt.exact import exact_attention, uniform_attention
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer
from maclin.adopt.measuring.candidates import Candidate, Trial, default_candidates, relative, squares, trials
from maclin.adopt.planning import EXACT, relative_cost
from maclin.core import mechanisms as registry
from maclin.core.break_even import BreakEvenKey, break_even_length, device_name
from maclin.core.design import split
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.core.mechanisms import Mechanism
from maclin.records import Choice, ChoiceRow, Config, MechanismError

KERNELS = ("exp", "inv", "log", "sqrt")
"""Of macformer, each tried with ppSBN and a learned temperature; trigh is the same function as exp."""


class Chosen(NamedTuple):
    """A mechanism that is ready, and how it was chosen.

    Args:
        mechanism: the winner, calibrated on all the sequences.
        choice: the record; ``print`` shows it.
    """

    mechanism: Mechanism
    choice: Choice


def tensor_candidates(head_dim: int) -> list[Candidate]:
    """What ``choose`` tries unless it is told: what an audit tries, without baselines, and the kernels of macformer.

    Args:
        head_dim: width of the heads.
    """
    found: list[Candidate] = [c for c in default_candidates(head_dim) if not registry.row(c[0]).baseline]
    found.extend(
        ("macformer", {"kernel": kernel, "temperature": "learned", "num_features": 4 * head_dim}) for kernel in KERNELS
    )
    return found


@torch.no_grad()
def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    candidates: Iterable[Candidate] | None = None,
    tolerance: float | None = None,
    length: int | None = None,
) -> Chosen:
    """The mechanism that is best on these q, k and v, ready for use, and the measurements behind it.

    Every third sequence is measured on, and mechanisms that learn from data learn from the others; of two sequences
    the second is measured on. Of what is cheaper than exact attention at ``length`` tokens the smallest error wins,
    with a tolerance the cheapest within it; where there is nothing, exact attention does. What is slower than fused
    exact attention at that length on this device (``maclin bench break-even``; a default where that was not run) is
    not cheaper.

    Args:
        q: queries (B, H, N, D) of several sequences.
        k: keys (B, Hk, S, D).
        v: values (B, Hk, S, Dv).
        key_mask: (B, S) bool, True = attend.
        is_causal: as in the calls to come.
        scale: of the logits in the calls to come; None is 1/sqrt(D).
        candidates: names, or pairs of name and configuration (default: ``tensor_candidates``).
        tolerance: largest relative error of the output against softmax attention, between 0 and 1.
        length: tokens for which costs are compared (default: S).

    Returns:
        The pair of the mechanism and the record of the choice. The mechanism has learned from all sequences.

    Raises:
        OptionError: a tolerance outside (0, 1), a length below 1, or an unknown mechanism.
        InputError: shapes that do not fit, fewer than two sequences, or no candidate that could be applied.

    Example:
        >>> mech, choice = maclin.choose(q, k, v, key_mask=mask, tolerance=0.2)
        >>> print(choice)
        >>> out = mech(q, k, v, key_mask=mask)
    """
    layer = _layer(q, k, v, key_mask, is_causal)
    if tolerance is not None and not 0 < tolerance < 1:
        raise OptionError(f"wanted a tolerance between 0 and 1 (a relative error, 0.1 is 10 %), got {tolerance}")
    if length is not None and length < 1:
        raise OptionError(f"wanted a length of at least 1 token, got {length}")
    call = AttentionCall("", q.detach(), k.detach(), v.detach(), key_mask, is_causal, scale)
    learning, measured = ([0], [1]) if q.shape[0] == 2 else split(range(q.shape[0]))
    tried = trials(tensor_candidates(layer.head_dim) if candidates is None else candidates, layer)
    sample = _on_cpu(only(call, learning))
    for trial in tried:
        trial.learn(sample)
    errors, by_sequence, uniform = _measured(tried, [only(call, [i]) for i in measured])
    tokens = k.shape[2] if length is None else length
    rows = [_row(error, layer, tolerance, tokens, q.device) for error in errors]
    order = sorted(range(len(rows)), key=lambda i: _key(rows[i], tolerance, tokens))
    fitting = [i for i in order if _fits(rows[i], tolerance, tokens)]
    if not any(row.rel_error is not None for row in rows):
        reasons = "; ".join(f"{row.mechanism}: {row.note}" for row in rows)
        raise InputError(f"no candidate could be applied to these q, k and v: {reasons or 'none was given'}")
    winner = rows[fitting[0]] if fitting else ChoiceRow(EXACT, {}, {}, 0.0, 1.0, True)
    runner = next((i for i in (fitting[1:] if fitting else order) if rows[i].rel_error is not None), None)
    better = None
    if fitting and runner is not None:
        pairs = [(own, its) for own, its in zip(by_sequence[fitting[0]], by_sequence[runner], strict=True)]
        better = sum(own < its for own, its in pairs) / len(pairs)
    assert winner.rel_error is not None
    second = None if runner is None else rows[runner]
    choice = Choice(
        mechanism=winner.mechanism,
        config=winner.config,
        rel_error=winner.rel_error,
        reason=_reason(winner, bool(fitting), tolerance, tokens),
        runner_up=None if second is None else second.mechanism,
        runner_up_config={} if second is None else second.config,
        margin=None if second is None or second.rel_error is None else second.rel_error - winner.rel_error,
        better_share=better,
        uniform_rel_error=uniform,
        tolerance=tolerance,
        length=tokens,
        num_learning=len(learning),
        num_measured=len(measured),
        rows=tuple(rows[i] for i in order),
    )
    return Chosen(_ready(winner, layer, call), choice)


def _layer(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> AttentionLayer:
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise InputError(f"choose: {label} has shape {tuple(x.shape)}; wanted (batch, heads, tokens, width)")
    sizes = {"head_dim": q.shape[3], "num_heads": q.shape[1], "num_kv_heads": k.shape[1]}
    registry.mechanism(EXACT, **sizes).check_inputs(q, k, v, key_mask)
    if q.shape[0] < 2:
        raise InputError(
            f"choose: {q.shape[0]} sequence; wanted at least 2, one to learn from and one to measure on: pass more, or "
            "cut a long one into several"
        )
    return AttentionLayer("", nn.Identity(), q.shape[1], k.shape[1], q.shape[3], v.shape[3], is_causal)


def _measured(
    tried: Sequence[Trial], calls: Sequence[AttentionCall]
) -> tuple[list[MechanismError], list[list[float]], float]:
    """Errors of all candidates, squared errors of each on each sequence, and the relative error of averaging."""
    exact_squares = uniform = torch.zeros(calls[0].q.shape[1], dtype=torch.float64)
    by_sequence: list[list[float]] = [[] for _ in tried]
    for call in calls:
        real = torch.ones(1, call.q.shape[2], dtype=torch.bool, device=call.q.device)
        if call.key_mask is not None and call.q.shape[2] == call.k.shape[2]:
            real = call.key_mask
        exact = exact_attention(call).out
        exact_squares = exact_squares + squares(exact, real)
        uniform = uniform + squares(uniform_attention(call) - exact, real)
        for trial, own in zip(tried, by_sequence, strict=True):
            before = float(torch.as_tensor(trial.squared).sum())
            trial.add(call, exact, real)
            own.append(float(torch.as_tensor(trial.squared).sum()) - before)
    return [trial.result(exact_squares) for trial in tried], by_sequence, relative(uniform, exact_squares)[0]


def _row(
    error: MechanismError, layer: AttentionLayer, tolerance: float | None, length: int, device: torch.device
) -> ChoiceRow:
    asked = error.config if error.asked is None else error.asked
    if error.rel_error is None:
        within = None if tolerance is None else False
        return ChoiceRow(error.mechanism, error.config, asked, None, None, within, error.reason or "")
    try:
        cost = relative_cost(error.mechanism, error.config, layer, length)
    except MaclinError as refused:
        return ChoiceRow(error.mechanism, error.config, asked, error.rel_error, None, None, str(refused))
    within = None if tolerance is None else error.rel_error <= tolerance and error.reached is not False
    since = _break_even(error.mechanism, layer, device)
    note = f"not cheaper than exact attention at {length} tokens" if cost >= 1 else ""
    if not note and length < since:
        note = f"exact attention is faster below {since} tokens on this device"
    note = "; ".join(filter(None, (note, error.note)))
    return ChoiceRow(error.mechanism, error.config, asked, error.rel_error, cost, within, note, since)


def _break_even(name: str, layer: AttentionLayer, device: torch.device) -> int:
    """Tokens from which on a mechanism is faster than exact attention: measured, or else assumed."""
    key = BreakEvenKey(name, device_name(device), "float32", layer.head_dim, layer.num_heads, layer.is_causal)
    found = break_even_length(key, device.type)
    return sys.maxsize if found is None else found


def _fits(row: ChoiceRow, tolerance: float | None, length: int) -> bool:
    known = registry.row(row.mechanism)
    if row.rel_error is None or known.baseline or not known.linear:
        return False
    if row.relative_cost is None or row.relative_cost >= 1 or length < (row.break_even_length or 0):
        return False
    return tolerance is None or bool(row.within_tolerance)


def _key(row: ChoiceRow, tolerance: float | None, length: int) -> tuple[bool, float]:
    """What fits first, by cost where there is a tolerance; then by error."""
    error = float("inf") if row.rel_error is None else row.rel_error
    fits = _fits(row, tolerance, length)
    return not fits, error if row.relative_cost is None or not fits or tolerance is None else row.relative_cost


def _reason(winner: ChoiceRow, found: bool, tolerance: float | None, length: int) -> str:
    if not found:
        within = "" if tolerance is None else f" within {tolerance:g}"
        return f"nothing{within} is cheaper than exact attention at {length} tokens; for longer ones pass length="
    what = "the smallest error" if tolerance is None else f"cheapest within {tolerance:g}"
    return f"{what}: {winner.rel_error:.3g}, at {winner.relative_cost:.3f} of exact attention's operations"


def _ready(winner: ChoiceRow, layer: AttentionLayer, call: AttentionCall) -> Mechanism:
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    config: Config = dict(winner.config)
    extra: dict[str, Any] = {}
    if registry.row(winner.mechanism).takes_generator:
        extra["generator"] = torch.Generator().manual_seed(0)
    made = registry.mechanism(winner.mechanism, **sizes, **config, **extra)
    if made.learns_from_data:
        made = learned(made, _on_cpu(call))
    return made.to(device=call.q.device, dtype=call.q.dtype)


def _on_cpu(call: AttentionCall) -> AttentionCall:
    q, k, v = (x.cpu() for x in (call.q, call.k, call.v))
    mask = None if call.key_mask is None else call.key_mask.cpu()
    return AttentionCall(call.layer, q, k, v, mask, call.is_causal, call.scale)
